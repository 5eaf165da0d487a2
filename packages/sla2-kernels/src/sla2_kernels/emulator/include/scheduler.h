// State of an emulated CUDA block, its threads and warps, and the strict rules of barriers and
// collectives; the fibers or threads that carry them are in fibers.h and os_threads.h.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };

namespace sla2 {

struct Place {  // where in the .cu file something is called
    const char* file;
    int line;
    static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
    const char* name() const {
        const char* slash = std::strrchr(file, '/');
        return slash ? slash + 1 : file;
    }
};

struct Operation {  // what a thread waits for
    const char* name = nullptr;
    Place place = {"", 0};
    bool same(const Operation& o) const {
        return std::strcmp(name, o.name) == 0 && place.line == o.place.line &&
               std::strcmp(place.file, o.place.file) == 0;
    }
};

struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
    int first = 0;  // thread that arrived first
    int sleeping = 0;  // threads in wait_until(), of os_threads.h
    Operation operation;
};

struct Warp {
    Barrier barrier;
    int lanes = 0;  // 32 but in a last, short warp
    alignas(16) unsigned char in[32][64], out[32][64];  // what lanes give to a collective, and get
};

// One cp.async, not landed yet.
struct Copy { unsigned char* to; const unsigned char* from; int bytes; };

struct Block;
struct Thread;

// What a block has beside its threads on newer GPUs: copies and products in flight (sm90.h).
struct Engine {
    virtual ~Engine() = default;
    virtual bool advance() = 0;  // something lands; false if nothing is in flight
    virtual void explain(const Thread& thread, char* text, size_t size) = 0;  // why it waits
    virtual void thread_returns(const Thread& thread) = 0;
    virtual void block_ends() = 0;
};

struct Thread {
    uint3 index = {};
    int linear = 0, lane = 0;
    Warp* warp = nullptr;
    Block* block = nullptr;
    bool done = false;
    const Barrier* waits_at = nullptr;
    unsigned generation = 0;  // of that barrier when the thread came to it
    Operation operation;
    std::vector<Copy> pending;                // issued, not committed
    std::vector<std::vector<Copy>> groups;    // committed, oldest first
    void* carrier = nullptr;                  // the fiber's stack pointer or context
};

// order: 0 forward, 1 reverse, 2 random.
struct Settings { int order; unsigned seed; int workers; };

struct Launch {
    dim3 grid, block;
    size_t shared_bytes;
    void (*call)(void (*)(), void**);
    void (*kernel)();
    void** arguments;
    Settings settings;
    char* message;
    size_t message_size;
    int failed = 0;
};

struct Block {
    uint3 index = {};
    dim3 size = {}, grid = {};
    unsigned char* shared = nullptr;
    Barrier barrier;
    int vote = 0;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Launch* launch = nullptr;
    std::unique_ptr<Engine> engine;
    bool failed = false;
    int lock = 0, asleep = 0, returned = 0;  // of os_threads.h
};

Thread& self();                     // the CUDA thread that runs
[[noreturn]] void abandon();        // leaves the block after a failure

inline void append(char* text, size_t size, const char* format, ...) {
    size_t used = std::strlen(text);
    if (used + 1 >= size) return;
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text + used, size - used, format, arguments);
    va_end(arguments);
}

// Records the first failure of the launch.
template <class... A> void report(Block& block, const char* format, A... arguments) {
    block.failed = true;
    if (__atomic_exchange_n(&block.launch->failed, 1, __ATOMIC_ACQ_REL)) return;
    char* text = block.launch->message;
    size_t size = block.launch->message_size;
    text[0] = 0;
    append(text, size, format, arguments...);
    append(text, size, " in block (%u,%u,%u)", block.index.x, block.index.y, block.index.z);
}

[[noreturn]] inline void misuse(const char* what, const Operation& operation) {
    Thread& t = self();
    report(*t.block, "%s at %s:%d, thread %d", what, operation.place.name(), operation.place.line,
           t.linear);
    abandon();
}

// One arrival of the running thread; true for the last one. Refuses a thread that is at another
// instruction than the first.
inline bool count_arrival(Barrier& b, int needed, const Operation& operation) {
    Thread& t = self();
    if (b.arrived == 0) {
        b.operation = operation;
        b.first = t.linear;
    } else if (!b.operation.same(operation)) {
        report(*t.block, "divergent barrier: thread %d at %s (%s:%d), thread %d at %s (%s:%d)",
               b.first, b.operation.name, b.operation.place.name(), b.operation.place.line,
               t.linear, operation.name, operation.place.name(), operation.place.line);
        abandon();
    }
    return ++b.arrived == needed;
}

// Nothing can run any more: says who waits where.
inline void report_stuck(Block& block) {
    char text[1500] = "divergent barrier:";
    std::vector<bool> told(block.threads.size(), false);
    for (size_t i = 0; i < block.threads.size(); i++) {
        const Thread& first = block.threads[i];
        if (told[i]) continue;
        auto alike = [&](const Thread& t) {
            return t.done == first.done &&
                   (t.done || (t.waits_at && t.operation.same(first.operation)));
        };
        append(text, sizeof text, i ? "; threads" : " threads");
        for (size_t j = i; j < block.threads.size(); j++) {
            if (told[j] || !alike(block.threads[j])) continue;
            size_t end = j;
            while (end + 1 < block.threads.size() && !told[end + 1] &&
                   alike(block.threads[end + 1]))
                end++;
            append(text, sizeof text, end > j ? " %zu-%zu" : " %zu", j, end);
            for (; j <= end; j++) told[j] = true;
            j--;
        }
        if (first.done)
            append(text, sizeof text, " have returned");
        else
            append(text, sizeof text, " at %s (%s:%d)", first.operation.name,
                   first.operation.place.name(), first.operation.place.line);
        if (block.engine && !first.done) block.engine->explain(first, text, sizeof text);
    }
    report(block, "%s", text);
}

inline void check_returning(const Thread& t) {
    bool waited = t.pending.empty();
    for (const auto& group : t.groups) waited &= group.empty();
    if (!waited)
        report(*t.block, "thread %d returned before its cp.async copies were waited for", t.linear);
    if (t.block->engine) t.block->engine->thread_returns(t);
}

void wait_for_block(const Operation& operation);  // a barrier of the block

// A barrier of the warp. Each lane deposits before it; `last` computes warp.out from warp.in.
template <class Last> void wait_for_warp(const Operation& operation, Last last);

// Waits at a barrier that others release() until `ready`, which runs guarded.
template <class Ready> void wait_until(Barrier& b, const Operation& operation, Ready ready);

// Lets those who wait_until() at a barrier look again; guarded.
void release(Barrier& b);

// A warp collective: deposits `bytes` of the lane's operands, computes once for all lanes, collects
// `out_bytes`.
template <class Compute>
void collective(const Operation& operation, const void* in, size_t bytes, void* out,
                size_t out_bytes, Compute compute);

}  // namespace sla2
