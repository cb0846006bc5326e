// Whole rows by clusters of blocks that come and go with their rows, from compute capability 9.0
// on: sums, stage 2 and gradient with one read and one write of the logits.
//
// Each block of a cluster has a slice of the row, whole segments, in windows of its shared memory.
// Its warps fetch and sum some segments each, and send the sums to the cluster's first block. One
// warp there merges them, runs stage 2, and sends the coefficients to every block, whose warps
// write the gradients of their segments from the windows. A warp waits for its own copies, and for
// the coefficients; nothing is used twice, so there is nothing to be vacated, and nobody meets at a
// barrier of the block.
//
// Nothing hides the exchange within a cluster. What hides it are the blocks of other rows on the
// same SM, at other points of their lives: registers and slices are few enough for several.
//
// Two mbarriers: sums_came() of the first block counts all sums of the row, coefs_came() of each
// its coefficients. The one cluster barrier makes them known before the first message. None is
// needed at the end: a block leaves when it has its coefficients, for which the first has all its
// sums, and nobody writes to it any more.
#pragma once

#include "cuda/segment.cuh"

namespace cfpo::cuda {

template <class T, class Stage, bool kEntropy>
class TransientWarp {
 public:
  CFPO_DEVICE TransientWarp(const Stage& stage, const Rows& dlogits, const TransientPlan& plan)
      : stage_(stage),
        logits_(stage.p.problem.logits),
        dlogits_(dlogits),
        plan_(plan),
        row_(static_cast<int>(hw::block_index() / plan.cluster)),
        first_(plan.first_segment(hw::cluster_rank())),
        count_(plan.first_segment(hw::cluster_rank() + 1) - first_) {}

  // The same way in all blocks of the cluster.
  CFPO_DEVICE void run() {
    if (stage_.skip(row_)) return skip_row();
    if (hw::thread_index() == 0) begin_barriers();
    hw::cluster_arrive_relaxed();
    x_ = static_cast<const T*>(logits_.row(row_));
    fetch();
    token_ = static_cast<int>(problem().column(row_));
    const float scale = row_scale(problem(), row_);
    // From here on the barriers exist, and all blocks run, so that others may write into them.
    hw::cluster_wait();
    send_sums(scale);
    if (hw::cluster_rank() == 0 && warp_index() == 0) settle(scale);
    write();
  }

 private:
  CFPO_DEVICE const Problem& problem() const { return stage_.p.problem; }
  template <class Shared>
  CFPO_DEVICE Shared* shared(int offset) const {
    return reinterpret_cast<Shared*>(hw::shared_memory() + offset);
  }
  using Sum = SentSum<kEntropy>;
  using Gradient = SentGradient<kEntropy>;
  CFPO_DEVICE Sum* sums() const { return shared<Sum>(plan_.sums); }
  CFPO_DEVICE Gradient* gradient() const { return shared<Gradient>(plan_.gradient); }
  CFPO_DEVICE hw::Barrier* sums_came() const { return shared<hw::Barrier>(plan_.barriers); }
  CFPO_DEVICE hw::Barrier* coefs_came() const { return sums_came() + 1; }

  // The slice's segments are numbered from 0. This warp has every plan_.warps-th.
  CFPO_DEVICE char* window(int i) const { return hw::shared_memory() + i * kWindowBytes; }
  template <class Element>
  CFPO_DEVICE Segment<Element> segment(Element* row, int i) const {
    return Segment<Element>(row, logits_.n_cols, first_ + i);
  }
  CFPO_DEVICE int target_column(int i) const { return column_in_segment<T>(token_, first_ + i); }

  CFPO_DEVICE void skip_row() const {
    if (hw::cluster_rank() == 0 && hw::thread_index() == 0) stage_.skipped(row_);
    T* out = static_cast<T*>(dlogits_.row(row_));
    for (int i = warp_index(); i < count_; i += plan_.warps) write_zeros(segment(out, i));
  }

  CFPO_DEVICE void begin_barriers() const {
    hw::barrier_init(sums_came(), 1);
    hw::barrier_init(coefs_came(), 1);
    hw::fence_barrier_init();
    hw::barrier_arrive_expect(coefs_came(), static_cast<int>(sizeof(Gradient)));
    if (hw::cluster_rank() != 0) return;
    hw::barrier_arrive_expect(sums_came(), plan_.n_segments * static_cast<int>(sizeof(Sum)));
  }

  CFPO_DEVICE void fetch() const {
    for (int i = warp_index(); i < count_; i += plan_.warps) {
      fetch_segment(window(i), segment(x_, i), hw::read_once());
    }
  }

  CFPO_DEVICE void send_sums(float scale) const {
    int later = (count_ - 1 - warp_index() + plan_.warps) / plan_.warps;
    for (int i = warp_index(); i < count_; i += plan_.warps) {
      hw::wait_copies(--later);
      hw::sync_warp();
      const Sum sum{sum_segment<T, kEntropy>(window(i), segment(x_, i), target_column(i), scale)};
      if (lane_index() == 0) send(sums() + first_ + i, sum, 0, sums_came());
    }
  }

  // To the same place in block `rank`.
  template <class Message>
  CFPO_DEVICE void send(Message* to, const Message& message, int rank, hw::Barrier* came) const {
    constexpr int kVectors = sizeof(Message) / kVectorBytes;
    Vector v[kVectors];
    std::memcpy(v, &message, sizeof v);
    for (int i = 0; i < kVectors; ++i) {
      hw::send_peer(reinterpret_cast<Vector*>(to) + i, rank, v[i], came);
    }
  }

  // From the row's sums to its scalars and the gradient's coefficients. All lanes do the same, for
  // without branches more of it overlaps; each of the first few sends to one block.
  CFPO_DEVICE void settle(float scale) const {
    const auto inputs = stage_.inputs(row_);
    // Nobody overwrites it before the coefficients are there, and one lane alone reads it.
    float target = problem().absent_logit();
    if (lane_index() == 0 && token_ >= 0) target = load_element(x_ + token_);
    target = hw::shuffle(target, 0);
    hw::barrier_wait(sums_came(), 0);
    const SharedArray<Sum> sums{this->sums()};
    const bool publish = lane_index() == 0;
    Gradient sent;
    if constexpr (kEntropy) {
      const MergedRow merged = merge_peaked(sums, plan_.n_segments, scale, target);
      const RowStats stats = stats_of(scale, target, merged, problem().sharded);
      sent = {settle_peaked(stage_, row_, stats, merged, publish, inputs)};
    } else {
      const RowSum sum = merge_plain(sums, plan_.n_segments);
      sent = {stage_(row_, inputs, join_target(scale, target, sum, problem().sharded), publish)};
    }
    if (lane_index() < plan_.cluster) send(gradient(), sent, lane_index(), coefs_came());
  }

  CFPO_DEVICE void write() const {
    hw::barrier_wait(coefs_came(), 0);
    const StageGradient<kEntropy> g = hw::read_shared(gradient()).gradient;
    T* out = static_cast<T*>(dlogits_.row(row_));
    for (int i = warp_index(); i < count_; i += plan_.warps) {
      const int shift = alignment_shift(x_), target = target_column(i);
      write_gradient<T, kEntropy>(window(i), shift, segment(out, i), target, without_peak(g),
                                  slope_of(stage_));
      if constexpr (kEntropy) {
        if (first_ + i == g.segment) {
          write_peak(window(i), shift, segment(out, i), target, stage_, row_, g);
        }
      }
    }
  }

  const Stage& stage_;
  const Rows& logits_;
  const Rows& dlogits_;
  const TransientPlan& plan_;
  int row_;
  int first_, count_;  // segments
  const T* x_ = nullptr;
  int token_ = 0;
};

template <class T, class Stage, bool kEntropy>
CFPO_KERNEL(transient_threads(kEntropy), 2)
transient_kernel(CFPO_ARGUMENT Stage stage, CFPO_ARGUMENT Rows dlogits,
                 CFPO_ARGUMENT TransientPlan plan) {
  if constexpr (hw::kHasClusters) {
    TransientWarp<T, Stage, kEntropy>(stage, dlogits, plan).run();
  } else {
    hw::stop();
  }
}

}  // namespace cfpo::cuda
