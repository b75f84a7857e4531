// Runs a block of CUDA threads on one CPU thread: every lane is a fiber, which runs until it has to wait for others.
//
// Nothing here knows time. Instead it looks for trouble: lanes run in a random order from one exchange to the next, a warp
// may run far ahead of the others until a barrier stops it, shared memory starts as NaN, and asynchronous copies land as soon
// as they are issued or, in another run, not before they are waited for. Asynchronous products do the opposite: they read
// shared memory when they are waited for or, where copies land late, as soon as they are issued.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

namespace emulation {

constexpr int kLanes = 32, kStackBytes = 64 * 1024, kExchanged = 64;
constexpr size_t kSharedBytes = 227 * 1024;  // of a block on an H100
constexpr size_t kGuardBytes = 4096;         // beyond it, where nobody may write

inline bool late_copies;  // land when they are waited for, not when they are issued
inline std::mt19937 random_source;
inline unsigned random_below(unsigned n) { return static_cast<unsigned>(random_source() * uint64_t{n} >> 32); }

// Dynamic shared memory: `bytes` that the launch asked for, of a larger buffer.
struct Shared {
    char* begin;
    size_t capacity, bytes;

    void poison() const { std::memset(begin, 0xff, capacity); }
    bool overrun() const {
        for (size_t i = bytes; i < capacity; ++i)
            if (begin[i] != '\xff') return true;
        return false;
    }
};
inline Shared shared;

struct Copy {
    uint32_t to;
    const void* from;  // null: zeros

    void land() const {
        if (from) std::memcpy(shared.begin + to, from, 16);
        else std::memset(shared.begin + to, 0, 16);
    }
};

struct Product {  // this lane's share of a warp group's
    float* c;
    std::vector<float> before;  // what c was; it is NaN until the product was waited for
    std::function<void()> compute;
};

struct Lane {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool waits, done;
    std::vector<Copy> copies;       // that have yet to land
    std::vector<size_t> groups;     // how many of them are in each group, the oldest first
    std::vector<Product> products;  // that have yet to be computed
    std::vector<size_t> product_groups;  // how many of them are in each group, the oldest first
    bool may_multiply;              // since a fence

    void land_copies(size_t count) {
        for (size_t i = 0; i < count; ++i) copies[i].land();
        copies.erase(copies.begin(), copies.begin() + count);
    }
};

struct Warp {
    int arrived, ready;     // lanes at an exchange; lanes that can run
    const void* operation;  // which exchange
    alignas(16) char in[kLanes][kExchanged], out[kLanes][kExchanged];
};

// A barrier in shared memory, whose phase ends when all have arrived and the bytes of copies have come that it was to expect.
struct Barrier {
    int arrivals, missing;  // of each phase; yet to come in this one
    int64_t bytes;          // yet to come; below 0 those that came before they were expected
    unsigned phases;        // that are over
    bool published;
    std::vector<std::function<void()>> copies;  // that have yet to land
    std::vector<unsigned> waiting;              // threads
};

struct Block {
    std::vector<Lane> lanes;
    std::vector<Warp> warps;
    std::map<uint32_t, Barrier> barriers;  // by address
    unsigned arrived, done;                // at the barrier of all threads; returned
    unsigned registers;                    // that threads have claimed
    bool paused;                           // a lane, so that other warps may run
    const std::function<void()>* body;
    ucontext_t scheduler;
    std::string error;
};
inline Block block;

inline Lane& this_lane() { return block.lanes[threadIdx.x]; }
inline void leave() { swapcontext(&this_lane().context, &block.scheduler); }

// Ends the launch with an exception. It is the scheduler that throws: an exception cannot leave a fiber.
[[noreturn]] inline void fail(const std::string& what) {
    block.error = what + " (thread " + std::to_string(threadIdx.x) + " of block " + std::to_string(blockIdx.x) + ")";
    while (true) leave();
}

inline void check_shared(uint32_t address, const char* instruction, unsigned alignment = 16, unsigned bytes = 16) {
    if (address % alignment) fail(std::string(instruction) + ": shared address not a multiple of " + std::to_string(alignment));
    if (address + uint64_t{bytes} > shared.bytes) fail(std::string(instruction) + ": shared address beyond what was asked for");
}

inline void wait() {
    this_lane().waits = true;
    --block.warps[threadIdx.x / kLanes].ready;
    leave();
}

inline void wake(Warp& warp) {
    warp.ready = kLanes;
    const size_t first = (&warp - block.warps.data()) * kLanes;
    for (size_t i = first; i < first + kLanes; ++i) block.lanes[i].waits = false;
}

inline void barrier() {
    if (++block.arrived < block.lanes.size()) return wait();
    block.arrived = 0;
    for (Warp& warp : block.warps) wake(warp);
}

constexpr uint64_t kBarrierMark = 0x6261727269657221;  // in its memory

inline void init_barrier(uint32_t address, int arrivals) {
    check_shared(address, "mbarrier", 8, 8);
    if (!block.barriers.insert({address, {arrivals, arrivals, 0, 0, false, {}, {}}}).second) fail("mbarrier: made twice");
    std::memcpy(shared.begin + address, &kBarrierMark, sizeof kBarrierMark);
}

inline Barrier& barrier_at(uint32_t address) {
    const auto found = block.barriers.find(address);
    if (found == block.barriers.end()) fail("mbarrier: none was made at this address");
    if (!found->second.published) fail("mbarrier: made, but not published");
    if (std::memcmp(shared.begin + address, &kBarrierMark, sizeof kBarrierMark)) fail("mbarrier: overwritten");
    return found->second;
}

inline void end_phase_of(Barrier& barrier) {
    if (barrier.missing > 0 || barrier.bytes != 0) return;
    barrier.missing = barrier.arrivals;
    ++barrier.phases;
    for (unsigned thread : std::exchange(barrier.waiting, {})) {
        block.lanes[thread].waits = false;
        ++block.warps[thread / kLanes].ready;
    }
}

// Those who waited may run before other lanes of this warp, which have not come as far.
inline void arrive(Barrier& barrier, int bytes) {
    if (barrier.missing == 0) fail("mbarrier: more arrivals than it counts, or bytes that never come");
    barrier.bytes += bytes;
    --barrier.missing;
    end_phase_of(barrier);
    block.paused = random_below(2) == 0;
    if (block.paused) leave();
}

inline void wait_for(Barrier& barrier, int parity) {
    while (static_cast<int>(barrier.phases % 2) == parity) {
        if (barrier.copies.empty()) {
            barrier.waiting.push_back(threadIdx.x);
            wait();
        } else {
            for (const auto& land : std::exchange(barrier.copies, {})) land();
        }
    }
}

// A copy of bytes to shared memory that the barrier counts: write() makes it. Until it lands nobody may use what was there.
template <typename Write>
void start_copy(uint32_t to, int bytes, Barrier& barrier, const Write& write) {
    const auto land = [bytes, &barrier, write] {
        write();
        barrier.bytes -= bytes;
        end_phase_of(barrier);
    };
    if (!late_copies || !barrier.waiting.empty()) return land();
    std::memset(shared.begin + to, 0xff, bytes);
    barrier.copies.push_back(land);
}

// What the lanes of a warp do at once: compute(in, out) gets what each handed in, and sets what each gets.
template <typename Out, typename In, typename Compute>
Out exchange(const In& mine, const Compute& compute) {
    static_assert(sizeof(In) <= kExchanged && sizeof(Out) <= kExchanged);
    static const char operation = 0;  // one address for each operation
    const unsigned lane = threadIdx.x % kLanes;
    Warp& warp = block.warps[threadIdx.x / kLanes];
    if (warp.arrived > 0 && warp.operation != &operation) fail("lanes of a warp meet in different operations");
    warp.operation = &operation;
    std::memcpy(warp.in[lane], &mine, sizeof mine);
    if (++warp.arrived < kLanes) {
        wait();
    } else {
        In in[kLanes];
        Out out[kLanes];
        for (int i = 0; i < kLanes; ++i) std::memcpy(&in[i], warp.in[i], sizeof(In));
        compute(in, out);
        for (int i = 0; i < kLanes; ++i) std::memcpy(warp.out[i], &out[i], sizeof(Out));
        warp.arrived = 0;
        wake(warp);
    }
    Out result;
    std::memcpy(&result, warp.out[lane], sizeof result);
    return result;
}

inline void run_lane() {
    (*block.body)();
    this_lane().done = true;
    --block.warps[threadIdx.x / kLanes].ready;
    ++block.done;
    while (true) leave();
}

// Runs every lane of a warp that can run, in a random order, or those that come before one that pauses.
inline void run_warp(unsigned index) {
    const unsigned start = random_below(kLanes), step = 2 * random_below(kLanes / 2) + 1;
    for (unsigned i = 0; i < kLanes; ++i) {
        threadIdx.x = index * kLanes + (start + i * step) % kLanes;
        Lane& lane = this_lane();
        if (lane.waits || lane.done) continue;
        swapcontext(&block.scheduler, &lane.context);
        if (!block.error.empty()) throw std::runtime_error(std::exchange(block.error, {}));
        if (block.paused) return;
    }
}

inline void run_block(unsigned threads) {
    block.lanes.resize(threads);
    block.warps.assign(threads / kLanes, Warp{0, kLanes, nullptr, {}, {}});
    block.barriers.clear();
    block.arrived = block.done = block.registers = 0;
    block.paused = false;
    for (Lane& lane : block.lanes) {
        lane.waits = lane.done = lane.may_multiply = false;
        lane.copies.clear();
        lane.groups.clear();
        lane.products.clear();
        lane.product_groups.clear();
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.get();
        lane.context.uc_stack.ss_size = kStackBytes;
        makecontext(&lane.context, run_lane, 0);
    }
    shared.poison();
    unsigned warp = 0;
    while (block.done < threads) {
        // It stays with a warp for a while: one that runs far ahead of the others meets what a missing barrier lets through.
        const bool paused = std::exchange(block.paused, false);
        if (paused || block.warps[warp].ready == 0 || random_below(64) == 0) {
            std::vector<unsigned> ready;
            for (unsigned i = 0; i < block.warps.size(); ++i)
                if (block.warps[i].ready > 0) ready.push_back(i);
            if (ready.empty()) throw std::runtime_error("deadlock: some threads wait for others that never come");
            warp = ready[random_below(ready.size())];
        }
        run_warp(warp);
    }
    for (const auto& [address, barrier] : block.barriers)
        if (!barrier.copies.empty()) throw std::runtime_error("copies that nobody waited for");
    if (shared.overrun()) throw std::runtime_error("a thread wrote beyond the shared memory that was asked for");
}

}  // namespace emulation
