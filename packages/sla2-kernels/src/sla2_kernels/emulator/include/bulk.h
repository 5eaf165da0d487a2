// cp.async.bulk from global to shared memory: NaN until it lands, which it does when nothing else
// can go on, or, in random order, at any time before.
#pragma once
#include "mbarrier.h"

namespace sla2 {

// The product in flight that reads some of these bytes.
inline const Product* product_reading(const Async& a, size_t at, size_t bytes) {
    for (const Warpgroup& w : a.warpgroups)
        for (const auto& p : w.products) {
            if (p->computed) continue;
            for (size_t chunk : p->chunks)
                if (chunk < at + bytes && at < chunk + 16) return p.get();
        }
    return nullptr;
}

[[noreturn]] inline void clash(const char* what, const Operation& other, const char* how,
                               const Operation& operation) {
    char text[200];
    std::snprintf(text, sizeof text, "%s that the %s of %s:%d %s,", what, other.name,
                  other.place.name(), other.place.line, how);
    misuse(text, operation);
}
}  // namespace sla2

inline void bulk_load(void* smem, const void* gmem, int bytes, unsigned long long* barrier,
                      sla2::Place p = sla2::Place::here()) {
    sla2::Operation operation = {"cp.async.bulk", p};
    sla2::memory_released(barrier);
    sla2::Guard guard(*sla2::self().block);
    sla2::Async& a = sla2::async();
    if (bytes < 16 || bytes % 16)
        sla2::misuse("cp.async.bulk: bytes are not a positive multiple of 16", operation);
    if (reinterpret_cast<uintptr_t>(gmem) % 16)
        sla2::misuse("cp.async.bulk: global address is not a multiple of 16", operation);
    size_t at = a.offset(smem, size_t(bytes), 16, operation);
    if (!sla2::mbarrier_at(a, barrier, operation).published)
        sla2::misuse("a bulk copy to an mbarrier without fence_proxy_async since its init,",
                     operation);
    if (const sla2::BulkCopy* other = a.copy_into(at, size_t(bytes)))
        sla2::clash("a bulk copy into shared memory", other->operation, "still fills", operation);
    if (const sla2::Product* other = sla2::product_reading(a, at, size_t(bytes)))
        sla2::clash("a bulk copy into shared memory", other->operation, "still reads", operation);
    if (!a.visible(at, size_t(bytes)))
        sla2::misuse("a bulk copy over shared memory that was written without fence_proxy_async "
                     "since,", operation);
    std::memset(smem, 0xff, size_t(bytes));
    std::memset(&a.seen[at], 0xff, size_t(bytes));
    a.copies.push_back({at, static_cast<const unsigned char*>(gmem), size_t(bytes),
                        size_t(reinterpret_cast<unsigned char*>(barrier) - a.block.shared),
                        operation});
}
