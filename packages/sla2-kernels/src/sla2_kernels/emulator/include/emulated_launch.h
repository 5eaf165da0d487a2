// Runs a grid: typed calls of kernels from an array of argument addresses, block by block; the
// library's C entry point.
#pragma once
#include "scheduler.h"
#include <atomic>
#include <thread>
#include <type_traits>
#include <utility>

namespace sla2 {

struct Entry {
    const char* name;
    void (*kernel)();
    void (*call)(void (*)(), void**);
    int count;
    const char* kinds;     // p pointer, f float, i integer
    const unsigned char* sizes;
};

template <class T>
constexpr char kind_of() {
    return std::is_pointer_v<T> ? 'p' : std::is_floating_point_v<T> ? 'f' : 'i';
}

template <class... A> struct Signature {
    static constexpr char kinds[sizeof...(A) + 1] = {kind_of<A>()..., 0};
    static constexpr unsigned char sizes[sizeof...(A) + 1] = {sizeof(A)..., 0};
    template <size_t... I> static void apply(void (*f)(A...), void** a, std::index_sequence<I...>) {
        f(*static_cast<std::remove_reference_t<A>*>(a[I])...);
    }
    static void call(void (*kernel)(), void** a) {
        apply(reinterpret_cast<void (*)(A...)>(kernel), a, std::index_sequence_for<A...>{});
    }
};

template <class... A> Entry entry(const char* name, void (*f)(A...)) {
    using S = Signature<A...>;
    return {name, reinterpret_cast<void (*)()>(f), &S::call, int(sizeof...(A)), S::kinds, S::sizes};
}

inline void run_block(Launch& launch, uint3 index) {
    Block block;
    block.index = index;
    block.size = launch.block;
    block.grid = launch.grid;
    block.launch = &launch;
    const int count = int(launch.block.x * launch.block.y * launch.block.z);
    void* raw = nullptr;  // allocated to the byte, so that AddressSanitizer sees one past the end
    if (posix_memalign(&raw, 1024, launch.shared_bytes ? launch.shared_bytes : 1)) std::abort();
    block.shared = static_cast<unsigned char*>(raw);
    std::memset(block.shared, 0xff, launch.shared_bytes);
    block.threads.resize(count);
    block.warps.resize((count + 31) / 32);
    for (int i = 0; i < count; i++) {
        Thread& t = block.threads[i];
        t.linear = i;
        t.lane = i & 31;
        t.index = {i % launch.block.x, i / launch.block.x % launch.block.y,
                   i / (launch.block.x * launch.block.y)};
        t.warp = &block.warps[i / 32];
        t.warp->lanes++;
        t.block = &block;
    }
    run_threads(block);
    std::free(raw);
}

inline void run_grid(Launch& launch) {
    const unsigned long total = (unsigned long)launch.grid.x * launch.grid.y * launch.grid.z;
    std::atomic<unsigned long> next{0};
    auto work = [&](unsigned worker) {
        Carrier carrier(launch.settings.seed + worker);
        for (unsigned long i; (i = next.fetch_add(1)) < total &&
                              !__atomic_load_n(&launch.failed, __ATOMIC_ACQUIRE);) {
            unsigned long j = launch.settings.order == 1 ? total - 1 - i : i;
            run_block(launch,
                      {unsigned(j % launch.grid.x), unsigned(j / launch.grid.x % launch.grid.y),
                       unsigned(j / launch.grid.x / launch.grid.y)});
        }
    };
    std::vector<std::thread> workers;
    for (int i = 1; i < launch.settings.workers; i++) workers.emplace_back(work, i);
    work(0);
    for (auto& worker : workers) worker.join();
}

}  // namespace sla2

extern const sla2::Entry sla2_entries[];

// Looks an entry up: 0, or 1 if it is not there.
extern "C" int sla2_describe(const char* name, const char** kinds, const unsigned char** sizes) {
    for (const sla2::Entry* e = sla2_entries; e->name; e++)
        if (std::strcmp(e->name, name) == 0) return *kinds = e->kinds, *sizes = e->sizes, 0;
    return 1;
}

// Runs an entry: 0, or 1 with a line in `message`.
extern "C" int sla2_emulate(const char* name, const unsigned* grid, const unsigned* block,
                            size_t shared_bytes, void** arguments, const int* settings,
                            char* message, size_t message_size) {
    for (const sla2::Entry* e = sla2_entries; e->name; e++) {
        if (std::strcmp(e->name, name) != 0) continue;
        sla2::Launch launch = {{grid[0], grid[1], grid[2]},
                               {block[0], block[1], block[2]},
                               shared_bytes,
                               e->call,
                               e->kernel,
                               arguments,
                               {settings[0], unsigned(settings[1]), settings[2]},
                               message,
                               message_size};
        sla2::run_grid(launch);
        return launch.failed;
    }
    std::snprintf(message, message_size, "no entry %s", name);
    return 1;
}
