// A tiny kernel for each wrapper of csrc/cuda/primitives_ptx.h and primitives_sm90.h, so that tests
// can run the inline PTX by itself. tests/support/ptx_tools/wrappers.py says what each computes.
#include "cuda/primitives.h"

#define TEST_KERNEL(name) extern "C" __global__ void test_##name

namespace cfpo::cuda {

TEST_KERNEL(indices)(std::int64_t* out) {
  const std::int64_t all =
      (hw::block_index_y() * hw::block_count() + hw::block_index()) * hw::block_threads() +
      hw::thread_index();
  out[4 * all] = hw::thread_index(),
          out[4 * all + 1] = hw::block_index() * 1000 + hw::block_count();
  out[4 * all + 2] = hw::block_index_y() * 1000 + hw::block_count_y(),
                out[4 * all + 3] = hw::block_threads();
}
TEST_KERNEL(stop)() {
  if (hw::thread_index() == 3) hw::stop();
}
// Each thread sees what the others wrote before.
TEST_KERNEL(sync_block)(int* out) {
  int* x = reinterpret_cast<int*>(hw::shared_memory());
  x[hw::thread_index()] = hw::thread_index() * 7;
  hw::sync_block();
  out[hw::thread_index()] = x[hw::block_threads() - 1 - hw::thread_index()];
}
TEST_KERNEL(sync_warp)(int* out) {
  volatile int* x = reinterpret_cast<int*>(hw::shared_memory());
  x[hw::thread_index()] = hw::thread_index() * 3;
  hw::sync_warp();
  out[hw::thread_index()] = x[hw::thread_index() ^ 31];
}
// The others wait for the block meanwhile: that is another barrier.
TEST_KERNEL(sync_threads)(int* out, int count) {
  volatile int* x = reinterpret_cast<int*>(hw::shared_memory());
  if (hw::thread_index() < count) {
    x[hw::thread_index()] = hw::thread_index() * 5;
    hw::sync_threads(count);
    out[hw::thread_index()] = x[count - 1 - hw::thread_index()];
  }
  hw::sync_block();
}
TEST_KERNEL(shuffles)(const float* in, float* out, const double* din, double* dout, int mask,
                      int lane) {
  const int i = hw::thread_index();
  out[2 * i] = hw::shuffle_xor(in[i], mask);
  out[2 * i + 1] = hw::shuffle(in[i], lane);
  dout[i] = hw::shuffle_xor(din[i], mask);
}
TEST_KERNEL(ballot)(const int* in, unsigned* out) {
  const unsigned bits = hw::ballot(in[hw::thread_index()] != 0);
  out[2 * hw::thread_index()] = bits,
          out[2 * hw::thread_index() + 1] = static_cast<unsigned>(hw::lowest_bit(bits));
}
TEST_KERNEL(warp_max)(const float* in, float* out) {
  out[hw::thread_index()] = hw::warp_max(in[hw::thread_index()]);
}
// Groups of one copy each, `pending` of which need not have landed; looks at the first `seen`.
TEST_KERNEL(copies)(const Vector* in, Vector* out, int groups, int pending, int seen, bool again) {
  Vector* x = reinterpret_cast<Vector*>(hw::shared_memory()) + hw::thread_index() * groups;
  const int first = hw::thread_index() * groups;
  const hw::Policy policy = again ? hw::read_again() : hw::read_once();
  for (int k = 0; k < groups; ++k) {
    hw::copy_async16(x + k, in + first + k, policy);
    hw::commit_copies();
  }
  hw::wait_copies(pending);
  for (int k = 0; k < seen; ++k) hw::store_streaming(out + first + k, hw::load_shared(x + k));
  hw::wait_copies(0);
}
TEST_KERNEL(vectors)(const Vector* in, Vector* out) {
  const int i = hw::thread_index(), n = hw::block_threads();
  Vector v = hw::load_global(in + i);
  v.word[0] += 1, v.word[3] += 4;
  hw::store_shared(hw::shared_memory() + 16 * i, v);
  hw::sync_block();
  v = hw::load_shared(hw::shared_memory() + 16 * (n - 1 - i));
  v.word[1] += 2;
  hw::store_streaming(out + i, v);
}
TEST_KERNEL(store_elements)(const float* in, float* f, bfloat16* b, float16* h) {
  const int i = hw::thread_index();
  const std::uint32_t pair = hw::floats_to_bfloat16s(in[i], 0.0f),
                      halves = hw::floats_to_halves(in[i], 0.0f);
  hw::store_streaming(f + i, in[i]);
  hw::store_streaming(b + i, bfloat16{static_cast<std::uint16_t>(pair)});
  hw::store_streaming(h + i, float16{static_cast<std::uint16_t>(halves)});
}
TEST_KERNEL(exp2)(const float* in, float* out) {
  out[hw::thread_index()] = hw::exp2_approx(in[hw::thread_index()]);
}
TEST_KERNEL(funnel)(const unsigned* in, unsigned* out) {
  const unsigned* x = in + 3 * hw::thread_index();
  out[hw::thread_index()] = hw::funnel_shift(x[0], x[1], static_cast<int>(x[2]));
}
TEST_KERNEL(from_half)(const unsigned short* in, float* out) {
  const std::int64_t i = hw::block_index() * hw::block_threads() + hw::thread_index();
  out[i] = hw::half_to_float(in[i]);
}
TEST_KERNEL(to_halves)(const float* in, unsigned* halves, unsigned* bfloats) {
  const std::int64_t i = hw::block_index() * hw::block_threads() + hw::thread_index();
  halves[i] = hw::floats_to_halves(in[2 * i], in[2 * i + 1]);
  bfloats[i] = hw::floats_to_bfloat16s(in[2 * i], in[2 * i + 1]);
}
TEST_KERNEL(max_pairs)(const unsigned* in, unsigned* halves, unsigned* bfloats) {
  const std::int64_t i = hw::block_index() * hw::block_threads() + hw::thread_index();
  halves[i] = hw::max_halves(in[2 * i], in[2 * i + 1]);
  bfloats[i] = hw::max_bfloat16s(in[2 * i], in[2 * i + 1]);
}

#if __CUDA_ARCH__ >= 900
TEST_KERNEL(cluster_rank)(int* out) {
  if (hw::thread_index() == 0)
    out[hw::block_index()] = hw::cluster_rank() + (hw::kHasClusters ? 100 : 0);
}
// Every thread of the cluster sees what all wrote to global memory before the barrier.
TEST_KERNEL(cluster_barrier)(int* x, int* out) {
  const int n = hw::block_threads() * static_cast<int>(hw::block_count());
  const int i = static_cast<int>(hw::block_index()) * hw::block_threads() + hw::thread_index();
  reinterpret_cast<volatile int*>(x)[i] = i + 1;
  hw::cluster_arrive();
  hw::cluster_wait();
  out[i] = reinterpret_cast<volatile int*>(x)[n - 1 - i];
}
// Block r sends (r, 10 + r, 20 + r, 30 + r) to place r of every block; `barriers` phases.
TEST_KERNEL(send)(unsigned* out, int rounds) {
  char* shared = hw::shared_memory();
  hw::Barrier *full = reinterpret_cast<hw::Barrier*>(shared + 256), *vacant = full + 1;
  const int rank = hw::cluster_rank(), n = static_cast<int>(hw::block_count()),
            lane = hw::thread_index();
  if (lane == 0) {
    hw::barrier_init(full, 1), hw::barrier_init(vacant, n);
    hw::fence_barrier_init();
  }
  hw::cluster_arrive_relaxed(), hw::cluster_wait();
  for (int round = 0; round < rounds; ++round) {
    if (lane == 0) hw::barrier_arrive_expect(full, n * 16);
    hw::barrier_wait(vacant, (round & 1) ^ 1);
    if (lane < n) {
      const unsigned k = static_cast<unsigned>(rank + 100 * round);
      hw::send_peer(shared + 16 * rank, lane, {{k, 10 + k, 20 + k, 30 + k}}, full);
    }
    hw::barrier_wait(full, round & 1);
    if (lane < n) {
      const Vector v = hw::load_shared(shared + 16 * lane);
      for (int w = 0; w < 4; ++w) out[((round * n + rank) * n + lane) * 4 + w] = v.word[w];
    }
    hw::sync_warp();
    hw::fence_async();
    if (lane < n) hw::arrive_peer(vacant, lane);
  }
  hw::cluster_arrive(), hw::cluster_wait();
}
// One message to one rank only: block 0 to `rank`, and an arrival too; the others get none.
TEST_KERNEL(send_one)(unsigned* out, int rank) {
  char* shared = hw::shared_memory();
  hw::Barrier *full = reinterpret_cast<hw::Barrier*>(shared + 64), *told = full + 1;
  if (hw::thread_index() == 0) {
    hw::barrier_init(full, 1), hw::barrier_init(told, 1);
    hw::store_shared(shared, {{7, 7, 7, 7}});
    hw::fence_async();
    hw::fence_barrier_init();
  }
  hw::cluster_arrive(), hw::cluster_wait();
  if (hw::thread_index() == 0 && hw::cluster_rank() == 0) {
    hw::send_peer(shared, rank, {{1, 2, 3, 4}}, full);
    hw::arrive_peer(told, rank);
  }
  if (hw::cluster_rank() == rank && hw::thread_index() == 0) {
    hw::barrier_arrive_expect(full, 16);
    hw::barrier_wait(full, 0);
    hw::barrier_wait(told, 0);
  }
  hw::cluster_arrive(), hw::cluster_wait();
  if (hw::thread_index() == 0) {
    const Vector v = hw::load_shared(shared);
    for (int w = 0; w < 4; ++w) out[hw::block_index() * 4 + w] = v.word[w];
  }
}
// Chunks through two slots: loaded, changed, stored.
TEST_KERNEL(bulk)(const unsigned* in, unsigned* out, int bytes, int chunks) {
  char* shared = hw::shared_memory();
  hw::Barrier* full = reinterpret_cast<hw::Barrier*>(shared + 2 * bytes);
  const int lane = hw::thread_index();
  const auto load = [&](int chunk) {
    hw::barrier_arrive_expect(full + chunk % 2, bytes);
    hw::bulk_load(shared + chunk % 2 * bytes, reinterpret_cast<const char*>(in) + chunk * bytes,
                  bytes, full + chunk % 2, hw::read_once());
  };
  if (lane == 0) {
    hw::barrier_init(full, 1), hw::barrier_init(full + 1, 1);
    hw::fence_barrier_init();
    load(0);
    if (chunks > 1) load(1);
  }
  hw::sync_block();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    char* slot = shared + chunk % 2 * bytes;
    hw::barrier_wait(full + chunk % 2, chunk / 2 & 1);
    for (int at = 16 * lane; at < bytes; at += 16 * hw::block_threads()) {
      Vector v = hw::load_shared(slot + at);
      for (auto& word : v.word) word = word * 3 + 1;
      hw::store_shared(slot + at, v);
    }
    hw::fence_async();
    hw::sync_block();
    if (lane == 0) {
      hw::bulk_store(reinterpret_cast<char*>(out) + chunk * bytes, slot, bytes, hw::read_again());
      hw::bulk_commit();
      hw::bulk_wait_read();
      if (chunk + 2 < chunks) load(chunk + 2);
    }
  }
}
// barrier_wait of the phase before the first passes; of the first, only after `count` arrivals.
TEST_KERNEL(parity)(int* out, int count) {
  hw::Barrier* b = reinterpret_cast<hw::Barrier*>(hw::shared_memory());
  volatile int* seen = reinterpret_cast<int*>(hw::shared_memory() + 8);
  const int i = hw::thread_index();
  if (i == 0) hw::barrier_init(b, count), *seen = 0;
  hw::sync_block();
  hw::barrier_wait(b, 1);
  hw::sync_block();  // or a late one would wait for the phase after the first
  for (int phase = 0; phase < 3; ++phase) {
    if (i < count) {
      if (i == count - 1) *seen = phase + 1;
      hw::barrier_arrive_expect(b, 0);
    }
    hw::barrier_wait(b, phase & 1);
    out[phase * hw::block_threads() + i] = *seen;
    hw::sync_block();
  }
}
#endif

}  // namespace cfpo::cuda
