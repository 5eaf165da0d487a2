// The ordinary carrier of emulated threads: one fiber per CUDA thread, switched by hand on x86-64,
// by ucontext elsewhere.
#pragma once
#include "scheduler.h"
#include <sys/mman.h>
#if defined(__x86_64__) && defined(__linux__)
#define SLA2_HAND_SWITCH 1
extern "C" void sla2_switch_stack(void** save, void* load);
#else
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define __shared__ static
#else
#include <link.h>
#define __shared__ static thread_local
#endif

namespace sla2 {

// A CUDA thread is a fiber: a stack of its own inside one OS thread, which runs until it waits at a
// barrier or returns, and then gives the processor back to run_threads() ("home"). Nothing runs at
// the same time within a block, so barriers need no locks, and the order of threads is ours.
constexpr size_t kStack = size_t(512) << 10;

struct Scheduler {
    Block* block = nullptr;
    Thread* running = nullptr;
    unsigned char* stacks = nullptr;
    size_t stack_count = 0;
    uint64_t random = 0;
    void* home = nullptr;  // where run_threads() stands while a fiber runs
    const void* home_bottom = nullptr;  // its stack, for AddressSanitizer
    size_t home_size = 0;
#if !defined(SLA2_HAND_SWITCH)
    ucontext_t home_context;
    std::vector<ucontext_t> contexts;
#endif
};

inline thread_local Scheduler* scheduler = nullptr;

inline Thread& self() { return *scheduler->running; }

inline unsigned char* stack_of(int thread) { return scheduler->stacks + size_t(thread) * kStack; }

// Runs a fiber until it comes home. AddressSanitizer is told of every change of stack.
inline void to_fiber(Thread& t) {
    Scheduler& s = *scheduler;
    s.running = &t;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_of(t.linear), kStack);
#endif
#if defined(SLA2_HAND_SWITCH)
    sla2_switch_stack(&s.home, t.carrier);
#else
    swapcontext(&s.home_context, static_cast<ucontext_t*>(t.carrier));
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// Leaves the running fiber; returns when the scheduler runs it again, or never if it is the `last`
// time.
inline void to_home(bool last) {
    Scheduler& s = *scheduler;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, s.home_bottom, s.home_size);
#else
    (void)last;
#endif
#if defined(SLA2_HAND_SWITCH)
    sla2_switch_stack(&s.running->carrier, s.home);
#else
    swapcontext(static_cast<ucontext_t*>(s.running->carrier), &s.home_context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void abandon() {  // no unwinding: what the fiber's frames own is leaked, in a failed launch
    self().done = true;
    to_home(true);
    std::abort();
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler->home_bottom, &scheduler->home_size);
#endif
    Thread& t = self();
    Launch& launch = *t.block->launch;
    launch.call(launch.kernel, launch.arguments);
    check_returning(t);
    t.done = true;
    to_home(true);
    std::abort();
}

// Gives a thread a fresh stack that begins in fiber_main().
inline void prepare(Thread& t) {
    unsigned char* bottom = stack_of(t.linear);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(bottom, kStack);  // poisoned by the frames of the block before
#endif
#if defined(SLA2_HAND_SWITCH)
    // The stack as sla2_switch_stack leaves one: six saved registers, then the address that it
    // returns to and, above that, the place of fiber_main's own return address. When a function
    // begins, the x86-64 ABI wants the stack pointer to be 8 more than a multiple of 16: so it is.
    void** top = reinterpret_cast<void**>(bottom + kStack) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    t.carrier = top;
#else
    ucontext_t& c = scheduler->contexts[t.linear];
    getcontext(&c);
    c.uc_stack.ss_sp = bottom;
    c.uc_stack.ss_size = kStack;
    c.uc_link = nullptr;
    makecontext(&c, fiber_main, 0);
    t.carrier = &c;
#endif
}

// A barrier counts its uses (`generation`): a thread is released when the count has moved on, even
// if faster threads wait at the same barrier again by then.
inline void wait_until_released(Barrier& b, const Operation& operation) {
    Thread& t = self();
    t.waits_at = &b;
    t.generation = b.generation;
    t.operation = operation;
    while (b.generation == t.generation) to_home(false);
    t.waits_at = nullptr;
}

// The last of `needed` threads to arrive does what is to be done once, and goes on without leaving
// its fiber; the others run again when the scheduler comes to them.
template <class Last> void arrive(Barrier& b, int needed, const Operation& operation, Last last) {
    if (!count_arrival(b, needed, operation)) return wait_until_released(b, operation);
    last();
    b.arrived = 0;
    b.generation++;
}

// Fibers of a block never run at the same time: nothing to guard, no order of memory to tell of.
struct Guard { explicit Guard(Block&) {} };
struct Unguarded {};
inline void memory_released(void*) {}
inline void memory_acquired(void*) {}

template <class Ready> void wait_until(Barrier& b, const Operation& operation, Ready ready) {
    while (!ready()) wait_until_released(b, operation);
}

inline void release(Barrier& b) { b.generation++; }

inline void wait_for_block(const Operation& operation) {
    Block& block = *self().block;
    arrive(block.barrier, int(block.threads.size()), operation, [] {});
}

template <class Last> void wait_for_warp(const Operation& operation, Last last) {
    Warp& warp = *self().warp;
    arrive(warp.barrier, warp.lanes, operation, last);
}

template <class Compute>
void collective(const Operation& operation, const void* in, size_t bytes, void* out,
                size_t out_bytes, Compute compute) {
    Thread& t = self();
    Warp& warp = *t.warp;
    std::memcpy(warp.in[t.lane], in, bytes);
    wait_for_warp(operation, [&] { compute(warp); });
    std::memcpy(out, warp.out[t.lane], out_bytes);
}

// Static __shared__ variables are this library's thread-local block: fill it with NaN, keep the
// scheduler's pointer. The block has no name in C++, so it is looked up in the program headers of
// the library that holds this function.
inline void poison_static_shared() {
#if !defined(__SANITIZE_ADDRESS__)
    Scheduler* keep = scheduler;
    dl_iterate_phdr([](dl_phdr_info* info, size_t, void*) {
        auto code = reinterpret_cast<uintptr_t>(&poison_static_shared);
        for (int i = 0; i < info->dlpi_phnum; i++) {
            const auto& p = info->dlpi_phdr[i];
            uintptr_t from = info->dlpi_addr + p.p_vaddr;
            if (p.p_type != PT_LOAD || code < from || code >= from + p.p_memsz) continue;
            for (int j = 0; j < info->dlpi_phnum; j++)
                if (info->dlpi_phdr[j].p_type == PT_TLS && info->dlpi_tls_data)
                    std::memset(info->dlpi_tls_data, 0xff, info->dlpi_phdr[j].p_memsz);
            return 1;
        }
        return 0;
    }, nullptr);
    scheduler = keep;
#endif
}

inline unsigned next_random(Scheduler& s) {
    s.random = s.random * 6364136223846793005ull + 1442695040888963407ull;
    return unsigned(s.random >> 33);
}

// AddressSanitizer keeps what it noted of abandoned frames after the memory is unmapped, and would
// hold it against the library that is loaded at this address next.
inline void release_stacks(Scheduler& s) {
    if (!s.stacks) return;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(s.stacks, s.stack_count * kStack);
#endif
    munmap(s.stacks, s.stack_count * kStack);
}

inline void run_threads(Block& block) {
    Scheduler& s = *scheduler;
    const int count = int(block.threads.size());
    if (s.stack_count < size_t(count)) {
        release_stacks(s);
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        s.stacks = static_cast<unsigned char*>(
            mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, flags, -1, 0));
        s.stack_count = count;
    }
#if !defined(SLA2_HAND_SWITCH)
    s.contexts.resize(count);
#endif
    poison_static_shared();
    for (Thread& t : block.threads) prepare(t);
    // Rounds: each runs every thread that can run, in the chosen order (drawn anew in each round if
    // random). Copies in flight land when none can (if random, also at times before); a round in
    // which nothing happens is a deadlock.
    std::vector<int> order(count);
    const int kind = block.launch->settings.order;
    for (int i = 0; i < count; i++) order[i] = kind == 1 ? count - 1 - i : i;
    for (int left = count; left && !block.failed;) {
        bool moved = false;
        if (kind == 2) {
            for (int i = count - 1; i > 0; i--)
                std::swap(order[i], order[next_random(s) % unsigned(i + 1)]);
            if (block.engine && next_random(s) % 4 == 0) block.engine->advance();
        }
        for (int i : order) {
            Thread& t = block.threads[i];
            // done, or at a barrier that not all have reached
            if (t.done || (t.waits_at && t.waits_at->generation == t.generation)) continue;
            moved = true;
            to_fiber(t);
            left -= t.done;
            if (block.failed) break;
        }
        if (!moved && !(block.engine && block.engine->advance())) report_stuck(block);
    }
    if (block.engine && !block.failed) block.engine->block_ends();
}

struct Carrier {  // what one worker needs for its blocks
    Scheduler own;
    explicit Carrier(unsigned seed) { own.random = seed; scheduler = &own; }
    ~Carrier() {
        release_stacks(own);
        scheduler = nullptr;
    }
};

}  // namespace sla2
