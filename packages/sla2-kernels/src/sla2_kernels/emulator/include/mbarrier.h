// mbarriers in shared memory: arrivals, phases, transaction bytes; the fence between proxies.
#pragma once
#include "async_state.h"

namespace sla2 {

constexpr uint64_t kMbarrier = 0x5245495252414224;  // what its 8 bytes hold

inline Mbarrier& mbarrier_at(Async& a, const void* at, const Operation& operation) {
    auto found = a.mbarriers.find(a.offset(at, 8, 8, operation));
    if (found == a.mbarriers.end()) misuse("an mbarrier that was not initialised", operation);
    if (std::memcmp(at, &kMbarrier, 8)) misuse("an mbarrier that was overwritten", operation);
    return found->second;
}

inline void mbarrier_arrival(const void* at, int bytes, const Operation& operation) {
    memory_released(const_cast<void*>(at));
    Guard guard(*self().block);
    Async& a = async();
    Mbarrier& m = mbarrier_at(a, at, operation);
    if (bytes < 0) misuse("an mbarrier cannot expect less than nothing", operation);
    if (m.pending == 0) misuse("more arrivals at an mbarrier than its count", operation);
    m.pending--;
    m.bytes += bytes;
    a.settle(m);
}
}  // namespace sla2

inline void mbarrier_init(unsigned long long* at, int count, sla2::Place p = sla2::Place::here()) {
    sla2::Operation operation = {"mbarrier_init", p};
    sla2::Guard guard(*sla2::self().block);
    sla2::Async& a = sla2::async();
    size_t offset = a.offset(at, 8, 8, operation);
    if (a.mbarriers.count(offset)) sla2::misuse("an mbarrier initialised twice", operation);
    if (count < 1) sla2::misuse("an mbarrier needs a count of at least 1", operation);
    std::memcpy(at, &sla2::kMbarrier, 8);
    sla2::Mbarrier& m = a.mbarriers[offset];
    m.count = m.pending = unsigned(count);
    m.owner = sla2::self().linear;
}
inline void mbarrier_arrive(unsigned long long* at, sla2::Place p = sla2::Place::here()) {
    sla2::mbarrier_arrival(at, 0, {"mbarrier_arrive", p});
}
inline void mbarrier_arrive_expect(unsigned long long* at, int bytes,
                                   sla2::Place p = sla2::Place::here()) {
    sla2::mbarrier_arrival(at, bytes, {"mbarrier_arrive_expect", p});
}
inline void mbarrier_wait(unsigned long long* at, unsigned parity,
                          sla2::Place p = sla2::Place::here()) {
    sla2::Operation operation = {"mbarrier_wait", p};
    sla2::Mbarrier* m;
    {
        sla2::Guard guard(*sla2::self().block);
        if (parity > 1) sla2::misuse("the parity of a phase is 0 or 1", operation);
        m = &sla2::mbarrier_at(sla2::async(), at, operation);
    }
    sla2::wait_until(m->waiters, operation, [&] { return (m->phase & 1) != parity; });
    sla2::memory_acquired(at);
}
inline void fence_proxy_async() {
    sla2::Guard guard(*sla2::self().block);
    sla2::Async& a = sla2::async();
    std::memcpy(a.seen.data(), a.block.shared, a.size);
    for (auto& [at, m] : a.mbarriers) m.published |= m.owner == sla2::self().linear;
}
