// The carrier for ThreadSanitizer: one OS thread per CUDA thread. Block and warp barriers order
// memory; a shuffle, vote or mma does not (the programming model promises nothing there), so its
// exchange is hidden from the sanitizer.
#pragma once
#include "scheduler.h"
#include <condition_variable>
#include <ctime>
#include <linux/futex.h>
#include <mutex>
#include <sched.h>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>
#define __shared__ static

extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
}

namespace sla2 {

inline thread_local Thread* running = nullptr;
inline Thread& self() { return *running; }
struct Abandoned {};
inline void abandon() { throw Abandoned{}; }

struct Hidden {  // what happens inside is invisible to the sanitizer
    Hidden() {
        AnnotateIgnoreReadsBegin("", 0);
        AnnotateIgnoreWritesBegin("", 0);
        AnnotateIgnoreSyncBegin("", 0);
    }
    ~Hidden() {
        AnnotateIgnoreSyncEnd("", 0);
        AnnotateIgnoreWritesEnd("", 0);
        AnnotateIgnoreReadsEnd("", 0);
    }
};

struct Locked {  // the block's bookkeeping
    Block& block;
    explicit Locked(Block& block) : block(block) {
        while (__atomic_exchange_n(&block.lock, 1, __ATOMIC_ACQUIRE)) sched_yield();
    }
    ~Locked() { __atomic_store_n(&block.lock, 0, __ATOMIC_RELEASE); }
    void check() {  // who sleeps now can be woken by a thread that still runs, or by a copy
        while (block.asleep && block.asleep + block.returned == int(block.threads.size()))
            if (!(block.engine && block.engine->advance())) return report_stuck(block);
    }
};

// What is shared beside barriers: one thread at a time, unseen by the sanitizer.
struct Guard {
    Hidden hidden;
    Locked locked;
    explicit Guard(Block& block) : locked(block) {}
};

struct Unguarded {  // inside a Guard: memory that the sanitizer shall see again
    Unguarded() {
        AnnotateIgnoreWritesEnd("", 0);
        AnnotateIgnoreSyncEnd("", 0);
    }
    ~Unguarded() {
        AnnotateIgnoreSyncBegin("", 0);
        AnnotateIgnoreWritesBegin("", 0);
    }
};
inline void memory_released(void* at) { __tsan_release(at); }
inline void memory_acquired(void* at) { __tsan_acquire(at); }

inline void wake(Barrier& b) {
    __atomic_fetch_add(&b.generation, 1, __ATOMIC_ACQ_REL);
    syscall(SYS_futex, &b.generation, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
}

inline void release(Barrier& b) {
    self().block->asleep -= b.sleeping;
    b.sleeping = 0;
    wake(b);
}

inline void sleep_until_moved(Barrier& b, unsigned generation) {
    timespec patience = {0, 100000000};
    while (__atomic_load_n(&b.generation, __ATOMIC_ACQUIRE) == generation) {
        if (__atomic_load_n(&self().block->launch->failed, __ATOMIC_ACQUIRE)) abandon();
        syscall(SYS_futex, &b.generation, FUTEX_WAIT_PRIVATE, generation, &patience, nullptr, 0);
    }
}

template <class Ready> void wait_until(Barrier& b, const Operation& operation, Ready ready) {
    Hidden hidden;
    Thread& t = self();
    for (;;) {
        unsigned generation;
        {
            Locked locked(*t.block);
            if (ready()) return;
            generation = __atomic_load_n(&b.generation, __ATOMIC_ACQUIRE);
            t.waits_at = &b;
            t.operation = operation;
            t.block->asleep++;
            b.sleeping++;
            locked.check();
        }
        sleep_until_moved(b, generation);
        t.waits_at = nullptr;
    }
}

template <class Last> void arrive(Barrier& b, int needed, const Operation& operation, Last last) {
    Hidden hidden;
    Thread& t = self();
    unsigned generation = __atomic_load_n(&b.generation, __ATOMIC_ACQUIRE);
    {
        Locked locked(*t.block);
        if (count_arrival(b, needed, operation)) {
            last();
            b.arrived = 0;
            t.block->asleep -= needed - 1;
            wake(b);
            return;
        }
        t.waits_at = &b;
        t.operation = operation;
        t.block->asleep++;
        locked.check();
    }
    sleep_until_moved(b, generation);
    t.waits_at = nullptr;
}

inline void wait_for_block(const Operation& operation) {
    Block& block = *self().block;
    __tsan_release(&block.barrier);
    arrive(block.barrier, int(block.threads.size()), operation, [] {});
    __tsan_acquire(&block.barrier);
}

template <class Last> void wait_for_warp(const Operation& operation, Last last) {
    Warp& warp = *self().warp;
    __tsan_release(&warp.barrier);
    arrive(warp.barrier, warp.lanes, operation, last);
    __tsan_acquire(&warp.barrier);
}

template <class Compute>
void collective(const Operation& operation, const void* in, size_t bytes, void* out,
                size_t out_bytes, Compute compute) {
    Hidden hidden;
    Thread& t = self();
    Warp& warp = *t.warp;
    std::memcpy(warp.in[t.lane], in, bytes);
    arrive(warp.barrier, warp.lanes, operation, [&] { compute(warp); });
    std::memcpy(out, warp.out[t.lane], out_bytes);
}

inline void run_thread(Thread& t) {
    running = &t;
    try {
        t.block->launch->call(t.block->launch->kernel, t.block->launch->arguments);
        check_returning(t);
    } catch (const Abandoned&) {
    }
    Hidden hidden;
    Locked locked(*t.block);
    t.done = true;
    t.block->returned++;
    if (!t.block->failed) locked.check();
}

// Threads are dear under the sanitizer: they stay for the next block. Their start and end order
// memory with the launcher, and with nobody else: the mutex itself is hidden.
struct Pool {
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<std::thread> threads;
    Block* block = nullptr;
    // Threads of the block that runs; 0 between blocks, when `block` points to nothing.
    size_t count = 0;
    unsigned round = 0;
    size_t left = 0;
    bool stopping = false;
    char started = 0, ended = 0;

    Thread* next(size_t index, unsigned& seen) {
        Hidden hidden;
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return stopping || (round != seen && index < count); });
        seen = round;
        return stopping ? nullptr : &block->threads[index];
    }

    void finish() {
        Hidden hidden;
        std::lock_guard<std::mutex> lock(mutex);
        if (--left == 0) changed.notify_all();
    }

    void work(size_t index) {
        unsigned seen = 0;
        while (Thread* t = next(index, seen)) {
            __tsan_acquire(&started);
            run_thread(*t);
            __tsan_release(&ended);
            finish();
        }
    }

    void run(Block& next) {
        for (size_t i = threads.size(); i < next.threads.size(); i++)
            threads.emplace_back([this, i] { work(i); });
        __tsan_release(&started);
        {
            Hidden hidden;
            std::unique_lock<std::mutex> lock(mutex);
            block = &next;
            left = count = next.threads.size();
            round++;
            changed.notify_all();
            changed.wait(lock, [&] { return left == 0; });
            count = 0;
        }
        __tsan_acquire(&ended);
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            stopping = true;
        }
        changed.notify_all();
        for (std::thread& thread : threads) thread.join();
    }
};

inline void run_threads(Block& block) {
    static Pool pool;
    pool.run(block);
    if (block.engine && !block.failed) block.engine->block_ends();
}

struct Carrier { explicit Carrier(unsigned) {} };

}  // namespace sla2
