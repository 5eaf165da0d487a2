// The carrier for ThreadSanitizer: one OS thread per CUDA thread. Block and warp barriers order memory; a shuffle, vote or
// mma does not (the programming model promises nothing there), so its exchange is hidden from the sanitizer.
#pragma once
#include "scheduler.h"
#include <ctime>
#include <linux/futex.h>
#include <pthread.h>
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
inline void abandon() { pthread_exit(nullptr); }

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

inline void take(Barrier& b) { while (__atomic_exchange_n(&b.lock, 1, __ATOMIC_ACQUIRE)) sched_yield(); }
inline void give(Barrier& b) { __atomic_store_n(&b.lock, 0, __ATOMIC_RELEASE); }

template <class Last> void arrive(Barrier& b, int needed, const Operation& operation, Last last) {
    Hidden hidden;
    Thread& t = self();
    unsigned generation = __atomic_load_n(&b.generation, __ATOMIC_ACQUIRE);
    take(b);
    bool is_last = count_arrival(b, needed, operation);
    t.operation = operation;
    give(b);
    if (is_last) {
        last();
        b.arrived = 0;
        __atomic_fetch_add(&b.generation, 1, __ATOMIC_ACQ_REL);
        syscall(SYS_futex, &b.generation, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
        return;
    }
    t.waits_at = &b;
    timespec patience = {1, 0};
    for (int seconds = 0; __atomic_load_n(&b.generation, __ATOMIC_ACQUIRE) == generation;) {
        long code = syscall(SYS_futex, &b.generation, FUTEX_WAIT_PRIVATE, generation, &patience, nullptr, 0);
        if (__atomic_load_n(&t.block->launch->failed, __ATOMIC_ACQUIRE)) abandon();
        if (code && ++seconds > 60) {
            report_stuck(*t.block);
            abandon();
        }
    }
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
void collective(const Operation& operation, const void* in, size_t bytes, void* out, size_t out_bytes, Compute compute) {
    Hidden hidden;
    Thread& t = self();
    Warp& warp = *t.warp;
    std::memcpy(warp.in[t.lane], in, bytes);
    arrive(warp.barrier, warp.lanes, operation, [&] { compute(warp); });
    std::memcpy(out, warp.out[t.lane], out_bytes);
}

inline void* thread_main(void* argument) {
    Thread& t = *static_cast<Thread*>(argument);
    running = &t;
    t.block->launch->call(t.block->launch->kernel, t.block->launch->arguments);
    return nullptr;
}

inline void run_threads(Block& block) {
    std::vector<pthread_t> threads(block.threads.size());
    for (Thread& t : block.threads) pthread_create(&threads[t.linear], nullptr, thread_main, &t);
    for (pthread_t thread : threads) pthread_join(thread, nullptr);
}

struct Carrier { explicit Carrier(unsigned) {} };

}  // namespace sla2
