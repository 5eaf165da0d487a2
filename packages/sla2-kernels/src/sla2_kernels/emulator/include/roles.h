// How warps of a block take roles: an elected lane, barriers of some of its warps, registers moved
// from one warpgroup to another.
#pragma once
#include "async_state.h"

// The hardware elects one lane and always the same; which one is not told.
inline bool elect_one(sla2::Place p = sla2::Place::here()) {
    sla2::wait_for_warp({"elect_one", p}, [] {});
    const sla2::Thread& t = sla2::self();
    const sla2::Settings& s = t.block->launch->settings;
    return t.lane == (s.order == 0 ? 0 : s.order == 1 ? 31 : int(s.seed % 32));
}

namespace sla2 {
// One arrival of the running thread; returns the barrier and its generation before.
inline std::pair<NamedBarrier*, unsigned> arrive_named(int id, int threads,
                                                       const Operation& operation) {
    Block& block = *self().block;
    NamedBarrier* b;
    {
        Guard guard(block);
        if (id < 1 || id > 15) misuse("a named barrier has a number of 1 to 15", operation);
        if (threads < 32 || threads % 32 || size_t(threads) > block.threads.size())
            misuse("a named barrier counts whole warps of the block", operation);
        b = &async().named[id];
    }
    memory_released(b);
    Guard guard(block);
    if (b->arrived == 0) {
        b->needed = threads;
        b->who.assign(block.threads.size(), false);
    }
    if (b->needed != threads)
        misuse("a named barrier at which others have arrived with another count,", operation);
    if (b->who[size_t(self().linear)])
        misuse("a second arrival at a named barrier before the others'", operation);
    b->who[size_t(self().linear)] = true;
    unsigned generation = b->waiters.generation;
    if (++b->arrived == b->needed) {
        b->arrived = 0;
        release(b->waiters);
    }
    return {b, generation};
}
}  // namespace sla2

inline void named_barrier_arrive(int id, int threads, sla2::Place p = sla2::Place::here()) {
    sla2::arrive_named(id, threads, {"named_barrier_arrive", p});
}
inline void named_barrier_sync(int id, int threads, sla2::Place p = sla2::Place::here()) {
    sla2::Operation operation = {"named_barrier_sync", p};
    auto arrival = sla2::arrive_named(id, threads, operation);
    sla2::Barrier& waiters = arrival.first->waiters;
    sla2::wait_until(waiters, operation, [&] { return waiters.generation != arrival.second; });
    sla2::memory_acquired(arrival.first);
}

namespace sla2 {
// All 128 threads of a warpgroup ask for another number of registers; more come when others have
// given theirs back.
inline void set_registers(int registers, bool more, const Operation& operation) {
    Thread& t = self();
    Async* a;
    {
        Guard guard(*t.block);
        if (registers < 24 || registers > 256 || registers % 8)
            misuse("setmaxnreg takes a multiple of 8 from 24 to 256", operation);
        if (t.block->threads.size() % 128)
            misuse("setmaxnreg needs whole warpgroups of 128 threads", operation);
        a = &async();
    }
    Warpgroup& w = a->warpgroups[size_t(t.linear / 128)];
    if (more && registers < w.registers) misuse("setmaxnreg.inc to fewer registers", operation);
    if (!more && registers > w.registers) misuse("setmaxnreg.dec to more registers", operation);
    arrive(w.together, 128, operation, [&] {
        if (more) return;
        a->free_registers += 128 * (w.registers - registers);
        w.registers = registers;
        release(a->registers_freed);
    });
    wait_until(a->registers_freed, operation, [&] {
        if (w.registers == registers) return true;
        if (a->free_registers < 128 * (registers - w.registers)) return false;
        a->free_registers -= 128 * (registers - w.registers);
        w.registers = registers;
        return true;
    });
}
}  // namespace sla2

template <int REGISTERS> void setmaxnreg_dec(sla2::Place p = sla2::Place::here()) {
    sla2::set_registers(REGISTERS, false, {"setmaxnreg.dec", p});
}
template <int REGISTERS> void setmaxnreg_inc(sla2::Place p = sla2::Place::here()) {
    sla2::set_registers(REGISTERS, true, {"setmaxnreg.inc", p});
}
