// Stands for csrc/cuda/instructions.h where there is no GPU: the threads of a block take turns on one
// thread of the CPU, and each instruction does what the manual says of it. What hardware may do at
// any time between two points, such as a copy, is done at the first or at the last of them.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define MEDFAST_DEVICE inline

namespace medfast::cuda {

struct bf16 {
  uint16_t bits;
};

// A matrix [length, D] of 16-bit features, copied in boxes of so many rows.
struct TensorMap {
  const bf16* matrix;
  int64_t length, D;
  int rows;
};

inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

namespace emulated {

// Threads pass when as many as it counts have come.
struct Gate {
  int arrived = 0;
  uint64_t passed = 0;
};

struct Barrier {
  int arrivals = 0, missing = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
  void settle() {
    // What has come before it was expected counts below 0: that is no end of a phase.
    if (missing != 0 || bytes != 0) return;
    missing = arrivals;
    ++phase;
  }
};

struct Copy {
  unsigned char* to;
  const void* from;  // null for zeros
};

struct Product {
  uint64_t a, b;
  std::array<float (*)[16][4], 32> d;
};

struct Warp {
  Gate gate;
  std::array<std::array<unsigned char, 64>, 32> in, out;
  std::deque<std::vector<Product>> products{1};
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool is_done = true;
  // It goes on when this is no longer so.
  const uint64_t* watched = nullptr;
  uint64_t value = 0;
  std::deque<std::vector<Copy>> copies;
};

struct Block {
  std::vector<unsigned char> memory;
  unsigned char* shared;
  std::map<int, Gate> named;
  Gate any_gate;
  bool any = false, any_result = false;
  std::map<uint32_t, Barrier> barriers;

  // Memory is full of NaN.
  explicit Block(size_t bytes) : memory(bytes + 1024, 0xff) {
    const auto start = reinterpret_cast<uintptr_t>(memory.data());
    shared = memory.data() + (1024 - start % 1024) % 1024;
  }
  Block(Block&&) = default;
};

struct Machine {
  bool is_lazy = true;
  std::mt19937 random{0};
  // Blocks of a cluster run together.
  int threads = 0, cluster_size = 1, current = 0;
  int64_t cluster = 0;
  std::vector<Thread> all;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  Gate pair;
  std::deque<std::function<void()>> boxes;
  ucontext_t scheduler;
  std::function<void()> body;

  Thread& me() { return all[current]; }
  int rank() const { return current / threads; }
  Block& mine() { return blocks[rank()]; }
  Warp& warp() { return warps[current / 32]; }

  void sleep(const uint64_t* watched, uint64_t value) {
    me().watched = watched;
    me().value = value;
    swapcontext(&me().context, &scheduler);
  }

  // Waits for `count` threads; the last one first does what is to be done by one.
  template <class Last>
  void meet(Gate& gate, int count, const Last& last, bool waits = true) {
    if (++gate.arrived == count) {
      last();
      gate.arrived = 0;
      ++gate.passed;
    } else if (gate.arrived > count) {
      throw std::logic_error("more threads at a barrier than it counts");
    } else if (waits) {
      sleep(&gate.passed, gate.passed);
    }
  }

  // All lanes of a warp hand in what they have; `work` makes of it what each receives.
  template <class Out, class In, class Work>
  Out together(const In& in, const Work& work) {
    static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64);
    Warp& w = warp();
    const int lane = current % 32;
    std::memcpy(w.in[lane].data(), &in, sizeof in);
    meet(w.gate, 32, [&] {
      std::array<In, 32> ins;
      std::array<Out, 32> outs{};
      for (int i = 0; i < 32; ++i) std::memcpy(&ins[i], w.in[i].data(), sizeof(In));
      work(ins, outs);
      for (int i = 0; i < 32; ++i) std::memcpy(w.out[i].data(), &outs[i], sizeof(Out));
    });
    Out out;
    std::memcpy(&out, w.out[lane].data(), sizeof out);
    return out;
  }

  static void enter();

  // Runs `body` in every thread of every block, those of a cluster at a time.
  void run(int64_t count, int block_threads, size_t shared_bytes, std::function<void()> what,
           int blocks_together = 1) {
    if (count % blocks_together != 0) throw std::logic_error("a part of a cluster");
    body = std::move(what);
    threads = block_threads;
    cluster_size = blocks_together;
    const size_t most = threads * cluster_size;
    if (all.size() < most) all.resize(most);
    for (cluster = 0; cluster < count / cluster_size; ++cluster) {
      blocks.clear();
      for (int i = 0; i < cluster_size; ++i) blocks.emplace_back(shared_bytes);
      boxes.clear();
      pair = {};
      warps.assign(most / 32, {});
      for (size_t i = 0; i < most; ++i) start(all[i]);
      schedule();
    }
  }

  void start(Thread& thread) {
    constexpr size_t kStack = 256 * 1024;
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, &Machine::enter, 0);
    thread.is_done = false;
    thread.watched = nullptr;
    thread.copies.assign(1, {});
  }

  // Runs threads until all are done. Some warps, others from time to time, run only when no other
  // can: whoever relies on their being in step is found out.
  void schedule() {
    std::vector<int> order(threads * cluster_size);
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    std::vector<bool> is_late(warps.size());
    for (int64_t round = 0;; ++round) {
      if (round % 512 == 0)
        for (size_t w = 0; w < warps.size(); ++w) is_late[w] = random() % 2 == 0;
      if (round % 8 == 0) std::shuffle(order.begin(), order.end(), random);
      if (advance(order, is_late, false) || advance(order, is_late, true)) continue;
      if (std::all_of(order.begin(), order.end(), [&](int i) { return all[i].is_done; })) break;
      if (boxes.empty()) throw std::logic_error("the threads of a block wait for one another");
      boxes.front()();
      boxes.pop_front();
    }
    if (!boxes.empty()) throw std::logic_error("a block ends while boxes are copied");
  }

  // Runs the threads of late warps, or of the others, each until it waits; whether any could.
  bool advance(const std::vector<int>& order, const std::vector<bool>& is_late, bool late) {
    bool could = false;
    for (const int i : order) {
      Thread& thread = all[i];
      if (is_late[i / 32] != late || thread.is_done) continue;
      if (thread.watched != nullptr && *thread.watched == thread.value) continue;
      could = true;
      thread.watched = nullptr;
      current = i;
      swapcontext(&scheduler, &thread.context);
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    }
    return could;
  }

  std::exception_ptr failure;
};

inline Machine& machine() {
  static Machine one;
  return one;
}

inline void Machine::enter() {
  Machine& m = machine();
  try {
    m.body();
  } catch (...) {
    m.failure = std::current_exception();
  }
  m.me().is_done = true;
}

inline void copy(const Copy& what) {
  if (what.from == nullptr)
    std::memset(what.to, 0, 16);
  else
    std::memcpy(what.to, what.from, 16);
}

// Entry k of a row of a matrix with 128-byte rows in the 128-byte swizzle: 16-byte chunks of an
// address are permuted by the bits that count lines of 128 bytes.
inline float swizzled_entry(uint32_t address, int row, int k) {
  uint32_t at = address + 128u * row + 2u * k;
  at ^= (at >> 7 & 7u) << 4;
  bf16 x;
  std::memcpy(&x, machine().mine().shared + at, sizeof x);
  return to_float(x);
}

// The address that a descriptor names, once it is one that this stands for.
inline uint32_t named_address(uint64_t descriptor) {
  const bool is_swizzled = descriptor >> 62 == 1;
  const bool is_packed = (descriptor >> 32 & 0x3fff) == 1024 / 16;
  const bool has_no_offset = (descriptor >> 49 & 7) == 0;
  if (!is_swizzled || !is_packed || !has_no_offset) throw std::logic_error("another descriptor");
  return static_cast<uint32_t>(descriptor & 0x3fff) << 4;
}

// The part of a product that warp `w` of a group does: rows 16 w to 16 w + 15.
inline void multiply_part(const Product& product, int w) {
  const uint32_t a = named_address(product.a), b = named_address(product.b);
  for (int i = 0; i < 16; ++i) {
    float row[16];
    for (int k = 0; k < 16; ++k) row[k] = swizzled_entry(a, 16 * w + i, k);
    for (int j = 0; j < 128; ++j) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += row[k] * swizzled_entry(b, j, k);
      (*product.d[i % 8 * 4 + j % 8 / 2])[j / 8][i / 8 * 2 + j % 2] += sum;
    }
  }
}

}  // namespace emulated

inline int thread_index() { return emulated::machine().current % emulated::machine().threads; }
inline int64_t block_index() {
  auto& m = emulated::machine();
  return m.cluster * m.cluster_size + m.rank();
}

inline void sync_named(int barrier, int threads) {
  auto& m = emulated::machine();
  m.meet(m.mine().named[barrier], threads, [] {});
}
inline void report_named(int barrier, int threads) {
  auto& m = emulated::machine();
  m.meet(m.mine().named[barrier], threads, [] {}, false);
}
inline void sync_block() { sync_named(0, emulated::machine().threads); }
inline bool sync_any(bool is) {
  auto& m = emulated::machine();
  auto& block = m.mine();
  block.any |= is;
  m.meet(block.any_gate, m.threads,
         [&] { block.any_result = std::exchange(block.any, false); });
  return block.any_result;
}

template <class T>
T shuffle_xor(T value, int mask) {
  return emulated::machine().together<T>(value, [&](const auto& in, auto& out) {
    for (int i = 0; i < 32; ++i) out[i] = in[i ^ mask];
  });
}

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) -
                               emulated::machine().mine().shared);
}

template <class Feature>
uint32_t packed(float first, float second) {
  return rounded(first) | static_cast<uint32_t>(rounded(second)) << 16;
}

inline void store_16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) throw std::logic_error("a store off its place");
  const uint32_t all[] = {a, b, c, d};
  std::memcpy(to, all, sizeof all);
}

inline void copy_async(uint32_t to, const void* from, bool exists) {
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    throw std::logic_error("a copy off its place");
  auto& m = emulated::machine();
  const emulated::Copy copy{m.mine().shared + to, exists ? from : nullptr};
  if (m.is_lazy)
    m.me().copies.back().push_back(copy);
  else
    emulated::copy(copy);
}
inline void close_copies() { emulated::machine().me().copies.emplace_back(); }
template <int kept>
void wait_for_copies() {
  auto& groups = emulated::machine().me().copies;
  while (groups.size() > kept + 1) {
    for (const auto& copy : groups.front()) emulated::copy(copy);
    groups.pop_front();
  }
}

inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
  auto& m = emulated::machine();
  using Four = std::array<uint32_t, 4>;
  const Four found = m.together<Four>(address, [&](const auto& in, auto& out) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        std::memcpy(&out[lane][matrix],
                    m.mine().shared + in[8 * matrix + lane / 4] + 4 * (lane % 4), 4);
  });
  std::copy(found.begin(), found.end(), to);
}

template <class Feature>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct In {
    float d[4];
    uint32_t a[4], b[2];
  } in;
  std::copy(d, d + 4, in.d);
  std::copy(a, a + 4, in.a);
  in.b[0] = b0;
  in.b[1] = b1;
  using Four = std::array<float, 4>;
  const auto half = [](uint32_t pair, int which) {
    return to_float({static_cast<uint16_t>(pair >> 16 * which)});
  };
  const Four found = emulated::machine().together<Four>(in, [&](const auto& ins, auto& out) {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j) {
        const int lane = i % 8 * 4 + j / 2, entry = i / 8 * 2 + j % 2;
        float sum = ins[lane].d[entry];
        for (int k = 0; k < 16; ++k)
          sum += half(ins[i % 8 * 4 + k % 8 / 2].a[i / 8 + k / 8 * 2], k % 2) *
                 half(ins[j * 4 + k % 8 / 2].b[k / 8], k % 2);
        out[lane][entry] = sum;
      }
  });
  std::copy(found.begin(), found.end(), d);
}

inline void barrier_init(uint32_t barrier, int arrivals) {
  if (barrier % 8 != 0) throw std::logic_error("a barrier off its place");
  emulated::machine().mine().barriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void barriers_ready() {}
inline int pair_rank() { return emulated::machine().rank(); }
inline void sync_pair() {
  auto& m = emulated::machine();
  m.meet(m.pair, m.threads * m.cluster_size, [] {});
}
inline void barrier_arrive(uint32_t barrier, int rank) {
  auto& b = emulated::machine().blocks.at(rank).barriers.at(barrier);
  if (--b.missing < 0) throw std::logic_error("more arrivals than a barrier counts");
  b.settle();
}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  auto& m = emulated::machine();
  m.mine().barriers.at(barrier).bytes += bytes;
  barrier_arrive(barrier, m.rank());
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  auto& m = emulated::machine();
  const auto& b = m.mine().barriers.at(barrier);
  while ((b.phase & 1) == parity) m.sleep(&b.phase, b.phase);
}

// A box is so many rows of 64 entries, as its tensor map says.
inline void copy_box(emulated::Block& block, uint32_t to, const TensorMap* map, int column,
                     int row, uint32_t barrier) {
  auto& m = emulated::machine();
  if (to % 1024 != 0) throw std::logic_error("a box off its place");
  const auto work = [&block, to, map, column, row, barrier] {
    for (int i = 0; i < map->rows; ++i)
      for (int k = 0; k < 64; ++k) {
        const bool exists = row + i < map->length && column + k < map->D;
        const bf16 x = exists ? map->matrix[(row + i) * map->D + column + k] : bf16{0};
        uint32_t at = to + 128u * i + 2u * k;
        at ^= (at >> 7 & 7u) << 4;
        std::memcpy(block.shared + at, &x, sizeof x);
      }
    auto& b = block.barriers.at(barrier);
    b.bytes -= map->rows * 64 * 2;
    b.settle();
  };
  if (m.is_lazy)
    m.boxes.emplace_back(work);
  else
    work();
}
inline void copy_box(uint32_t to, const TensorMap* map, int column, int row, uint32_t barrier) {
  copy_box(emulated::machine().mine(), to, map, column, row, barrier);
}
inline void copy_box_to_pair(uint32_t to, const TensorMap* map, int column, int row,
                             uint32_t barrier) {
  for (auto& block : emulated::machine().blocks) copy_box(block, to, map, column, row, barrier);
}

template <int>
void more_registers() {}
template <int>
void fewer_registers() {}
inline void hold(float (&)[16][4]) {}
inline void open_products() {}

template <class Feature>
void multiply_group(float (&d)[16][4], uint64_t a, uint64_t b) {
  struct In {
    uint64_t a, b;
    float (*d)[16][4];
  };
  auto& m = emulated::machine();
  auto& warp = m.warp();
  const int place = m.current / 32 % 4;
  m.together<int>(In{a, b, &d}, [&](const auto& ins, auto&) {
    emulated::Product product{ins[0].a, ins[0].b, {}};
    for (int i = 0; i < 32; ++i) product.d[i] = ins[i].d;
    if (m.is_lazy)
      warp.products.back().push_back(product);
    else
      emulated::multiply_part(product, place);
  });
}
inline void close_products() {
  auto& m = emulated::machine();
  auto& warp = m.warp();
  m.together<int>(0, [&](const auto&, auto&) { warp.products.emplace_back(); });
}
template <int kept>
void wait_for_products() {
  auto& m = emulated::machine();
  auto& warp = m.warp();
  const int place = m.current / 32 % 4;
  m.together<int>(0, [&](const auto&, auto&) {
    while (warp.products.size() > kept + 1) {
      for (const auto& product : warp.products.front()) emulated::multiply_part(product, place);
      warp.products.pop_front();
    }
  });
}

}  // namespace medfast::cuda
