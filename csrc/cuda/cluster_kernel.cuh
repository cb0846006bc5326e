// Whole rows by clusters of blocks, from compute capability 9.0 on: sums, stage 2 and gradient with
// one read and one write of the logits, whatever the length of the row.
//
// A cluster works on one row at a time. Each block has a slice of it, whole segments, in a slot of
// shared memory, and the slots of a block are a ring: later rows come in by bulk copies while the
// first is worked on. Once a row, the blocks exchange the sums of its segments, so that each can
// merge all of them, in the order of every other kernel, and run stage 2 for itself. The gradient
// overwrites the logits in the slot and leaves it by bulk stores.
//
// Each warp has a chunk of the slot, some segments of each slice: it sums these, writes their
// gradient, stores the chunk and fetches what comes into it next. Chunks end at multiples of 2 KiB
// of the slot, and a row that is not aligned is shifted against that: the last segment of a chunk
// ends up to 15 bytes into the next. That matters for the sums only, which a barrier divides from
// all that overwrites a slot.
//
// A slot has the aligned vectors that the slice touches, as in segment.cuh. Reading these whole
// stays within the allocation, whose ends are aligned to more than a vector; the bytes of a
// neighbour that come along may change while they are read, and are not used.
#pragma once

#include "cuda/segment.cuh"

namespace cfpo::cuda {

template <class T, class Stage, bool kEntropy>
class ClusterWorker {
 public:
  CFPO_DEVICE ClusterWorker(const Stage& stage, const Rows& dlogits, const ClusterPlan& plan)
      : stage_(stage), dlogits_(dlogits), plan_(plan) {
    first_segment_ = plan.first_segment(hw::cluster_rank());
    count_ = plan.first_segment(hw::cluster_rank() + 1) - first_segment_;
    begin_ = warp_index() * count_ / plan.warps;
    end_ = (warp_index() + 1) * count_ / plan.warps;
    next_ = first_row();
  }

  CFPO_DEVICE void run() {
    if (hw::thread_index() == 0) {
      for (int i = 0; i < plan_.stages; ++i) hw::barrier_init(barrier(i), plan_.warps);
      hw::fence_barrier_init();
    }
    // From here on the barriers exist, and all blocks run, so that others may write into them.
    hw::cluster_arrive();
    hw::cluster_wait();
    for (int i = 0; i < plan_.stages; ++i) fetch_next();
    for (int row = first_row(); row < n_rows(); row += row_step()) {
      if (stage_.skip(row)) {
        skip_row(row);
      } else {
        do_row(row);
      }
    }
    if (lane_index() == 0) hw::bulk_wait_read();
  }

 private:
  // A slice is a Segment of more columns: first column, columns, shift.
  template <class Element>
  CFPO_DEVICE Segment<Element> slice(const Rows& rows, int row) const {
    Element* x = static_cast<Element*>(rows.row(row));
    Segment<Element> slice(x, rows.n_cols, first_segment_);
    const std::int64_t left = rows.n_cols - std::int64_t{first_segment_} * kSegmentColumns<T>;
    const int most = count_ * kSegmentColumns<T>;
    slice.count = left < most ? static_cast<int>(left) : most;
    return slice;
  }

  CFPO_DEVICE int n_rows() const { return static_cast<int>(logits().n_rows); }
  CFPO_DEVICE int first_row() const { return static_cast<int>(hw::block_index()) / plan_.cluster; }
  CFPO_DEVICE int row_step() const { return static_cast<int>(hw::block_count()) / plan_.cluster; }
  CFPO_DEVICE const Problem& problem() const { return stage_.p.problem; }
  CFPO_DEVICE const Rows& logits() const { return problem().logits; }

  CFPO_DEVICE char* slot(int index) const {
    return hw::shared_memory() + index * plan_.slot_bytes();
  }
  template <class Shared>
  CFPO_DEVICE Shared* shared(int offset) const {
    return reinterpret_cast<Shared*>(hw::shared_memory() + offset);
  }
  CFPO_DEVICE hw::Barrier* barrier(int index) const {
    return shared<hw::Barrier>(ClusterSharedMemory(plan_).barriers) + index;
  }
  CFPO_DEVICE RowGradient* gradient() const {
    return shared<RowGradient>(ClusterSharedMemory(plan_).gradient);
  }
  CFPO_DEVICE float* target() const {
    return shared<float>(ClusterSharedMemory(plan_).targets) + turn_;
  }
  CFPO_DEVICE PartialSum* parts() const {
    return shared<PartialSum>(ClusterSharedMemory(plan_).parts) + turn_ * plan_.n_segments;
  }

  // Where this warp's chunk ends within the slot.
  CFPO_DEVICE int chunk_end(const Segment<const T>& x) const {
    if (end_ < count_) return end_ * kSegmentBytes;
    const int bytes = x.shift + x.count * static_cast<int>(sizeof(T));
    return (bytes + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
  }

  // Starts to copy the next row that is read into the slot that has been free for longest.
  CFPO_DEVICE void fetch_next() {
    while (next_ < n_rows() && stage_.skip(next_)) next_ += row_step();
    if (next_ >= n_rows()) return;
    hw::sync_warp();  // all lanes have done with the chunk
    if (lane_index() == 0) {
      hw::bulk_wait_read();  // and its gradient has left it
      const Segment<const T> x = slice<const T>(logits(), next_);
      const int from = begin_ * kSegmentBytes;
      const int bytes = begin_ < end_ ? chunk_end(x) - from : 0;
      hw::barrier_arrive_expect(barrier(fetch_slot_), bytes);
      if (bytes > 0) {
        hw::bulk_load(slot(fetch_slot_) + from,
                      reinterpret_cast<const char*>(x.begin) - x.shift + from, bytes,
                      barrier(fetch_slot_), hw::read_once());
      }
    }
    next_ += row_step();
    fetch_slot_ = fetch_slot_ + 1 == plan_.stages ? 0 : fetch_slot_ + 1;
  }

  CFPO_DEVICE void skip_row(int row) {
    if (hw::cluster_rank() == 0 && hw::thread_index() == 0) stage_.skipped(row);
    const Segment<T> out = slice<T>(dlogits_, row);
    for (int i = begin_; i < end_; ++i) write_zeros(Segment<T>(out.begin, out.count, i));
  }

  CFPO_DEVICE void do_row(int row) {
    const Segment<const T> x = slice<const T>(logits(), row);
    const std::int64_t token = problem().token_ids[row];
    const bool exists = token >= 0 && token < logits().n_cols;
    // The target's column within the slice, unless it is in another.
    const int column = exists ? static_cast<int>(token) - first_segment_ * kSegmentColumns<T> : -1;
    const float scale = row_scale(problem(), row);
    hw::barrier_wait(barrier(slot_), parity_);
    share_sums(x, column, scale);
    hw::cluster_arrive();
    // While the others come: the row before has left its slot by now.
    if (started_) fetch_next();
    started_ = true;
    hw::cluster_wait();
    if (warp_index() == 0) {
      const RowSum sum = merge_segments(parts(), plan_.n_segments);
      if (lane_index() == 0) {
        const RowStats stats = join_target(scale, exists ? *target() : NAN, sum);
        *gradient() = stage_(row, stats, hw::cluster_rank() == 0);
      }
    }
    hw::sync_block();
    write_row(x, slice<T>(dlogits_, row), column);
    turn_ ^= 1;
    if (++slot_ == plan_.stages) {
      slot_ = 0;
      parity_ ^= 1;
    }
  }

  // The sums of this warp's segments, and the target's logit, go to every block of the cluster.
  CFPO_DEVICE void share_sums(const Segment<const T>& x, int column, float scale) {
    for (int i = begin_; i < end_; ++i) {
      const PartialSum part = sum_segment<T, kEntropy>(slot(slot_) + i * kSegmentBytes,
                                                       Segment<const T>(x.begin, x.count, i),
                                                       column_in_segment<T>(column, i), scale);
      if (lane_index() < plan_.cluster) {
        PartialSum* to = parts() + first_segment_ + i;
        hw::store_peer(&to->ref, lane_index(), part.ref);
        hw::store_peer(&to->sum, lane_index(), part.sum);
        hw::store_peer(&to->weighted, lane_index(), part.weighted);
      }
    }
    if (warp_index() == 0 && lane_index() < plan_.cluster && column >= 0 && column < x.count) {
      const T* columns = reinterpret_cast<const T*>(slot(slot_) + x.shift);
      hw::store_peer(target(), lane_index(), load_element(columns + column));
    }
  }

  CFPO_DEVICE void write_row(const Segment<const T>& x, const Segment<T>& out, int column) {
    if (out.shift == x.shift) {
      if (begin_ < end_) write_chunk(x, out, column);
      return;
    }
    // Nothing in the slot is where it has to be in memory.
    for (int i = begin_; i < end_; ++i) {
      write_gradient<T, kEntropy>(slot(slot_) + i * kSegmentBytes, x.shift,
                                  Segment<T>(out.begin, out.count, i),
                                  column_in_segment<T>(column, i), *gradient());
    }
    hw::sync_block();  // the next chunk's first vector was read too
  }

  CFPO_DEVICE void write_chunk(const Segment<const T>& x, const Segment<T>& out, int column) {
    constexpr int kSize = sizeof(T);
    const RowGradient& g = *gradient();
    char* bytes = slot(slot_);
    // Columns [0, head) and [tail, count) have no whole vector to themselves.
    const int before = (kVectorBytes - x.shift) % kVectorBytes / kSize;
    const int head = before < x.count ? before : x.count;
    const int tail = head + (x.count - head) / kVectorElements<T> * kVectorElements<T>;
    const int from = begin_ == 0 ? x.shift + head * kSize : begin_ * kSegmentBytes;
    const int to = end_ == count_ ? x.shift + tail * kSize : end_ * kSegmentBytes;
    for (int at = from + lane_index() * kVectorBytes; at < to; at += kWarpThreads * kVectorBytes) {
      float values[kVectorElements<T>];
      unpack<T>(hw::load_shared(bytes + at), values);
      gradient_vector<T, kEntropy>(values, (at - x.shift) / kSize, column, g);
      hw::store_shared(bytes + at, pack<T>(values));
    }
    hw::fence_async();
    hw::sync_warp();
    if (lane_index() == 0 && from < to) {
      hw::bulk_store(reinterpret_cast<char*>(out.begin) - out.shift + from, bytes + from, to - from,
                     hw::read_once());
      hw::bulk_commit();
    }
    if (begin_ == 0) write_elements(x, out, 0, head, column);
    if (end_ == count_) write_elements(x, out, tail, x.count, column);
  }
  // Fewer than a vector.
  CFPO_DEVICE void write_elements(const Segment<const T>& x, const Segment<T>& out, int first,
                                  int last, int column) {
    const int i = first + lane_index();
    if (i >= last) return;
    const T* columns = reinterpret_cast<const T*>(slot(slot_) + x.shift);
    store_element(out.begin + i,
                  gradient_at<kEntropy>(load_element(columns + i), i, column, *gradient()));
  }

  const Stage& stage_;
  const Rows& dlogits_;
  const ClusterPlan& plan_;
  int first_segment_;  // of the slice
  int count_;          // of its segments
  int begin_, end_;    // those of them that this warp has
  int next_;           // row to fetch, or to look at
  int fetch_slot_ = 0;
  int slot_ = 0;    // of the row at hand
  int parity_ = 0;  // of the phase in which it comes
  int turn_ = 0;    // copy of the exchange
  bool started_ = false;
};

template <class T, class Stage, bool kEntropy>
CFPO_KERNEL(kClusterThreads, 1)
cluster_kernel(CFPO_ARGUMENT Stage stage, CFPO_ARGUMENT Rows dlogits,
               CFPO_ARGUMENT ClusterPlan plan) {
  if constexpr (hw::kHasClusters) {
    ClusterWorker<T, Stage, kEntropy>(stage, dlogits, plan).run();
  } else {
    hw::stop();
  }
}

}  // namespace cfpo::cuda
