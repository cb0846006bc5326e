// Small kernels that use the primitives of clusters and bulk copies rightly or wrongly; the first
// argument says which. Exits with 0 if what the kernel computed is right; the emulation aborts
// where it finds a mistake.
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/primitives.h"
#include "emulation/schedule.h"

namespace cfpo::cuda {
namespace {

constexpr int kThreads = 64;
constexpr int kCluster = 4;
constexpr int kStages = 2;
constexpr int kChunk = 256;  // bytes

struct Mistakes {
  bool no_first_barrier, not_all_sent, early_exit, no_last_barrier, sent_too_early, no_wait,
      wrong_parity, early_refill, no_fence, too_few_bytes, misaligned, not_waited_for,
      sums_not_fenced, chunk_not_fenced, direct;
};

// Every block multiplies its chunks by what the cluster's blocks send around in two rounds, through
// two slots.
void kernel(const Mistakes& wrong, std::uint32_t* data, int n_chunks, float* sums) {
  char* shared = hw::shared_memory();
  auto* barriers = reinterpret_cast<hw::Barrier*>(shared + kStages * kChunk);
  hw::Barrier* const exchange = barriers + kStages;
  hw::Barrier* const vacant = exchange + 1;
  Vector* parts = reinterpret_cast<Vector*>(vacant + 1);
  const int rank = hw::cluster_rank(), thread = hw::thread_index();
  std::uint32_t* own = data + hw::block_index() * n_chunks * kChunk / 4;
  const auto load = [&](int chunk) {
    hw::Barrier* barrier = barriers + chunk % kStages;
    hw::barrier_arrive_expect(barrier, kChunk - (wrong.too_few_bytes ? 16 : 0));
    const int skew = wrong.misaligned ? 4 : 0;
    hw::bulk_load(shared + chunk % kStages * kChunk, own + chunk * kChunk / 4 + skew / 4, kChunk,
                  barrier, hw::read_once());
  };
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) hw::barrier_init(barriers + i, 1);
    hw::barrier_init(exchange, 1);
    hw::barrier_init(vacant, kCluster);
    hw::fence_barrier_init();
    for (int i = 0; i < kStages && i < n_chunks; ++i) load(i);
  }
  if (!wrong.no_first_barrier) {
    hw::cluster_arrive();
    hw::cluster_wait();
  }
  if (wrong.early_exit && rank == 0) return;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    if (thread == 0) {
      const int senders = wrong.not_all_sent ? kCluster - 1 : kCluster;
      hw::barrier_arrive_expect(exchange, senders * static_cast<int>(sizeof(Vector)));
    }
    if (!wrong.sent_too_early) hw::barrier_wait(vacant, round ^ 1);
    if (thread < kCluster) {
      const auto value = static_cast<std::uint32_t>((round + 1) * (rank + 1));
      hw::send_peer(parts + rank, thread, {{value, 0, 0, 0}}, exchange);
    }
    hw::barrier_wait(exchange, round);
    for (int k = 0; k < kCluster; ++k) {
      const Vector part = wrong.direct ? parts[k] : hw::read_shared(parts + k);
      sum += static_cast<float>(part.word[0]);
    }
    if (!wrong.sums_not_fenced) hw::fence_async();
    hw::sync_threads(kThreads);
    if (thread < kCluster) hw::arrive_peer(vacant, thread);
  }
  if (thread == 0) sums[hw::block_index()] = sum;
  for (int i = 0; i < n_chunks; ++i) {
    char* slot = shared + i % kStages * kChunk;
    const int parity = (i / kStages + (wrong.wrong_parity ? 1 : 0)) & 1;
    if (!wrong.no_wait) hw::barrier_wait(barriers + i % kStages, parity);
    if (thread < kChunk / kVectorBytes) {
      Vector v = hw::load_shared(slot + thread * kVectorBytes);
      for (auto& word : v.word) word *= static_cast<std::uint32_t>(sum);
      hw::store_shared(slot + thread * kVectorBytes, v);
      if (!wrong.no_fence) hw::fence_async();
    }
    if (wrong.chunk_not_fenced && thread == kThreads - 1) hw::load_shared(slot);
    hw::sync_block();
    if (thread == 0) {
      hw::bulk_store(own + i * kChunk / 4, slot, kChunk, hw::read_once());
      hw::bulk_commit();
      if (!wrong.early_refill) hw::bulk_wait_read();
      if (i + kStages < n_chunks) load(i + kStages);
    }
  }
  if (thread == 0 && wrong.early_refill && !wrong.not_waited_for) hw::bulk_wait_read();
  if (wrong.no_last_barrier) return;
  hw::cluster_arrive();
  hw::cluster_wait();
}

bool run(const Mistakes& wrong) {
  constexpr int kBlocks = 2 * kCluster, kChunks = 5;
  std::vector<Vector> memory(kBlocks * kChunks * kChunk / kVectorBytes + 1);
  auto* data = reinterpret_cast<std::uint32_t*>(memory.data());
  for (std::size_t i = 0; i < memory.size() * 4; ++i) data[i] = static_cast<std::uint32_t>(i);
  std::vector<float> sums(kBlocks, 0.0f);
  emulation::run_grid(kBlocks, 1, kCluster, kThreads, kStages * kChunk + 96,
                      [&] { kernel(wrong, data, kChunks, sums.data()); });
  bool right = true;
  for (float sum : sums) right = right && sum == 30.0f;
  for (std::size_t i = 0; i < kBlocks * kChunks * kChunk / 4; ++i) right &= data[i] == 30 * i;
  return right;
}

}  // namespace
}  // namespace cfpo::cuda

int main(int, char** arguments) {
  const std::string name = arguments[1];
  cfpo::cuda::Mistakes wrong{};
  const auto is = [&](const char* mistake) { return name == mistake; };
  wrong.no_first_barrier = is("no first barrier");
  wrong.not_all_sent = is("not all sent");
  wrong.early_exit = is("early exit");
  wrong.no_wait = is("no wait");
  wrong.wrong_parity = is("wrong parity");
  wrong.not_waited_for = is("not waited for");
  wrong.early_refill = is("early refill") || wrong.not_waited_for;
  wrong.no_fence = is("no fence");
  wrong.too_few_bytes = is("too few bytes");
  wrong.no_last_barrier = is("no last barrier");
  wrong.sent_too_early = is("sent too early");
  wrong.misaligned = is("misaligned");
  wrong.sums_not_fenced = is("sums not fenced");
  wrong.chunk_not_fenced = is("chunk not fenced");
  wrong.direct = is("direct");
  int failed = 0;
  for (const auto order :
       {emulation::Order::kForward, emulation::Order::kBackward, emulation::Order::kShuffled}) {
    emulation::machine().order = order;
    failed += !cfpo::cuda::run(wrong);
  }
  std::printf("%s: %d orders failed\n", name.c_str(), failed);
  return failed != 0;
}
