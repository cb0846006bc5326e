// Whole rows by clusters of blocks, from compute capability 9.0 on: sums, stage 2 and gradient with
// one read and one write of the logits, whatever the length of the row. Not for logits behind a
// softcap, which would take all the registers there are.
//
// A cluster works on one row after another. Each block has a slice of it, whole segments, in a slot
// of shared memory, and the slots of a block are a ring: later rows come in by bulk copies while
// earlier ones are worked on. The gradient overwrites the logits in the slot and leaves it by bulk
// stores.
//
// Two kinds of warps keep each other busy. Workers have a chunk of the slot each, some segments of
// every slice: they sum these, send the sums to every block of the cluster, and write the gradient
// of the row before. Meanwhile two more warps, the accountants, take rows by turns: one merges a
// row's sums, in the order of every other kernel, and runs stage 2, so that nobody waits for the
// exchange or for float64 unless it takes longer than two rows. Accountants also look ahead for
// rows that are not masked, and tell the workers about them.
//
// Rows that are not masked are numbered 0, 1, 2, ...; what has two copies uses copy number % 2, the
// turn. Which barrier allows what:
//
//   full[slot]       the row has come: workers sum it
//   exchange[turn]   all sums of the row have come: the accountant of this turn merges them
//   vacant[turn]     the accountants of this turn, one in each block, have merged the row: workers
//                    may send the sums of the row after next
//   ready[turn]      the row's coefficients are there, and the notes of the row `slots` later:
//                    workers write the gradient, and may fetch that row
//
// Chunks end at multiples of 2 KiB of the slot, and a row that is not aligned is shifted against
// that: the last segment of a chunk ends up to 15 bytes into the next. The sums read these; a slot
// is overwritten only after ready[], by when all sums have been taken.
//
// Threads read slots and sums by the generic proxy, bulk copies and messages overwrite them by the
// asynchronous one, and between the two no barrier alone gives an order. So whoever has read there
// calls fence_async before it says so: the accountant before vacant[]; a worker before it sends the
// last sums of a chunk that ends in the next one, and before it has done with the row. Every read
// goes through load_shared or read_shared, where the emulation sees whether it was fenced.
//
// A slot has the aligned vectors that the slice touches, as in segment.cuh. Reading these whole
// stays within the allocation, whose ends are aligned to more than a vector; the bytes of a
// neighbour that come along may change while they are read, and are not used.
#pragma once

#include "cuda/segment.cuh"

namespace cfpo::cuda {

// A row that is not masked, by its number, and its slot; `parity` of the phases of full[slot].
struct ClusterPlace {
  int number = 0;
  int slot = 0;
  int parity = 0;

  CFPO_DEVICE void advance(int slots) {
    ++number;
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// What the threads of a block have in common.
template <class T, class Stage, bool kEntropy>
class ClusterBlock {
 public:
  CFPO_DEVICE ClusterBlock(const Stage& stage, const Rows& dlogits, const ClusterPlan& plan)
      : stage_(stage),
        dlogits_(dlogits),
        plan_(plan),
        row_step_(static_cast<int>(hw::block_count()) / plan.cluster) {}

 protected:
  CFPO_DEVICE int n_rows() const { return static_cast<int>(logits().n_rows); }
  CFPO_DEVICE int first_row() const { return static_cast<int>(hw::block_index()) / plan_.cluster; }
  CFPO_DEVICE const Problem& problem() const { return stage_.p.problem; }
  CFPO_DEVICE const Rows& logits() const { return problem().logits; }

  template <class Shared>
  CFPO_DEVICE Shared* shared(int offset) const {
    return reinterpret_cast<Shared*>(hw::shared_memory() + offset);
  }
  CFPO_DEVICE hw::Barrier* barrier(int index) const {
    return shared<hw::Barrier>(plan_.shared.barriers) + index;
  }
  CFPO_DEVICE hw::Barrier* exchange(int turn) const { return barrier(turn); }
  CFPO_DEVICE hw::Barrier* vacant(int turn) const { return barrier(2 + turn); }
  CFPO_DEVICE hw::Barrier* ready(int turn) const { return barrier(4 + turn); }
  CFPO_DEVICE hw::Barrier* full(int slot) const { return barrier(6 + slot); }
  static CFPO_DEVICE int turn(int number) { return number & 1; }
  // Of the phase of a barrier by turns.
  static CFPO_DEVICE int parity(int number) { return number >> 1 & 1; }

  using Sent = SentSum<kEntropy>;
  using Gradient = StageGradient<kEntropy>;
  CFPO_DEVICE Gradient* gradient(int number) const {
    return shared<Gradient>(plan_.shared.gradients) + turn(number);
  }
  CFPO_DEVICE ClusterRow* notes(int number) const {
    return shared<ClusterRow>(plan_.shared.notes) + number % kClusterNotes;
  }
  CFPO_DEVICE ClusterRow noted(int number) const { return hw::read_shared(notes(number)); }
  // The sums of a row's segments; behind them the target's logit, as their first number.
  CFPO_DEVICE Sent* sums(int number) const {
    return shared<Sent>(plan_.shared.sums) + turn(number) * (plan_.n_segments + 1);
  }

  const Stage& stage_;
  const Rows& dlogits_;
  const ClusterPlan& plan_;
  int row_step_;
};

// Two warps of each block, which take rows by turns: from a row's sums to its scalars and the
// gradient's coefficients.
template <class T, class Stage, bool kEntropy>
class ClusterAccountant : ClusterBlock<T, Stage, kEntropy> {
  using Block = ClusterBlock<T, Stage, kEntropy>;
  using Block::dlogits_, Block::n_rows, Block::plan_, Block::row_step_, Block::stage_;
  using typename Block::Gradient, typename Block::Sent;

 public:
  CFPO_DEVICE ClusterAccountant(const Stage& stage, const Rows& dlogits, const ClusterPlan& plan)
      : Block(stage, dlogits, plan), which_(warp_index() - plan.warps), next_(Block::first_row()) {}

  // Before the cluster's first barrier.
  CFPO_DEVICE void begin() {
    if (which_ == 0 && lane_index() == 0) {
      for (int turn = 0; turn < 2; ++turn) {
        hw::barrier_init(Block::exchange(turn), 1);
        hw::barrier_init(Block::vacant(turn), plan_.cluster);
        hw::barrier_init(Block::ready(turn), 1);
      }
      for (int i = 0; i < plan_.slots; ++i) hw::barrier_init(Block::full(i), plan_.warps);
      hw::fence_barrier_init();
    }
    for (int i = 0; i < which_; ++i) {
      find_next();
      pass();
    }
    for (int number = which_; number < ahead(); number += kAccountants) note(number);
  }

  CFPO_DEVICE void run() {
    for (int number = which_;; number += kAccountants) {
      hw::sync_warp();
      const ClusterRow row = Block::noted(number);
      if (row.row < 0) return;
      note(number + ahead());
      settle(row, number);
    }
  }

 private:
  // What a row brings along, noted for itself.
  struct alignas(kVectorBytes) Inputs : Stage::Inputs {};
  static_assert(sizeof(Inputs) == kClusterInputs);

  CFPO_DEVICE Inputs* inputs(int number) const {
    return Block::template shared<Inputs>(plan_.shared.inputs) + number % kClusterNotes;
  }
  // Rows are noted so long before they are settled, a multiple of kAccountants: at ready[] of the
  // row `slots` before, whoever settles them has noted them.
  CFPO_DEVICE int ahead() const {
    return (plan_.slots + kAccountants - 1) / kAccountants * kAccountants;
  }

  // The lanes look at 32 rows at once, and keep what they find.
  CFPO_DEVICE void look_ahead() {
    const int row = next_ + lane_index() * row_step_;
    const bool exists = row < n_rows() && row >= 0;
    const bool active = exists && !stage_.skip(row);
    if (active) {
      x_ = Block::logits().row(row);
      out_ = dlogits_.row(row);
      row_ = row;
      token_ = static_cast<int>(Block::problem().column(row));
      scale_ = row_scale(Block::problem(), row);
      inputs_ = {stage_.inputs(row)};
    } else if (exists && which_ == 0 && hw::cluster_rank() == 0) {
      stage_.skipped(row);
    }
    left_ = hw::ballot(active);
    next_ =
        n_rows() - next_ > kWarpThreads * row_step_ ? next_ + kWarpThreads * row_step_ : n_rows();
  }
  CFPO_DEVICE void find_next() {
    while (left_ == 0 && next_ < n_rows()) look_ahead();
  }
  CFPO_DEVICE void pass() { left_ &= left_ - 1; }  // the lowest
  // Notes the next row that is read, or that there is none, and passes those of the others.
  CFPO_DEVICE void note(int number) {
    find_next();
    ClusterRow* const notes = Block::notes(number);
    if (left_ == 0) {
      notes->row = -1;
    } else if ((left_ & -left_) >> lane_index() == 1) {
      *notes = {x_, out_, row_, token_, scale_};
      *inputs(number) = inputs_;
    }
    pass();
    for (int i = 1; i < kAccountants; ++i) {
      find_next();
      pass();
    }
  }

  // All lanes do the same, for without branches more of it overlaps.
  CFPO_DEVICE void settle(const ClusterRow& row, int number) {
    const Inputs brought = hw::read_shared(inputs(number));
    const int turn = Block::turn(number);
    const bool leads = lane_index() == 0;
    const int sent = plan_.n_segments + (row.token >= 0 ? 1 : 0);
    if (leads) {
      hw::barrier_arrive_expect(Block::exchange(turn), sent * static_cast<int>(sizeof(Sent)));
    }
    hw::barrier_wait(Block::exchange(turn), Block::parity(number));
    const SharedArray<Sent> sums{Block::sums(number)};
    MergedRow merged;
    float target = NAN;
    if constexpr (kEntropy) {
      if (row.token >= 0) target = sums[plan_.n_segments].top;
      merged = merge_peaked(sums, plan_.n_segments, row.scale, target);
    } else {
      if (row.token >= 0) target = sums[plan_.n_segments].ref;
      merged.sum = merge_plain(sums, plan_.n_segments);
    }
    hw::fence_async();
    hw::sync_warp();  // all lanes have read, and fenced
    if (lane_index() < plan_.cluster) hw::arrive_peer(Block::vacant(turn), lane_index());
    const bool publish = leads && hw::cluster_rank() == 0;
    Gradient gradient;
    if constexpr (kEntropy) {
      const RowStats stats = stats_of(row.scale, target, merged, false);
      gradient = settle_peaked(stage_, row.row, stats, merged, publish, brought);
    } else {
      const RowStats stats = join_target(row.scale, target, merged.sum);
      gradient = stage_(row.row, brought, stats, publish);
    }
    if (leads) {
      *Block::gradient(number) = gradient;
      hw::barrier_arrive_expect(Block::ready(turn), 0);
    }
  }

  int which_;               // of the accountants
  int next_;                // row to look at
  std::uint32_t left_ = 0;  // lanes whose row is to be noted; of each lane:
  const void* x_ = nullptr;
  void* out_ = nullptr;
  int row_ = 0;
  int token_ = 0;
  float scale_ = 0.0f;
  Inputs inputs_{};
};

template <class T, class Stage, bool kEntropy>
class ClusterWorker : ClusterBlock<T, Stage, kEntropy> {
  using Block = ClusterBlock<T, Stage, kEntropy>;
  using Block::dlogits_, Block::logits, Block::n_rows, Block::plan_, Block::row_step_,
      Block::stage_;
  using typename Block::Gradient, typename Block::Sent;

 public:
  CFPO_DEVICE ClusterWorker(const Stage& stage, const Rows& dlogits, const ClusterPlan& plan)
      : Block(stage, dlogits, plan), next_(Block::first_row()) {
    first_segment_ = plan.first_segment(hw::cluster_rank());
    count_ = plan.first_segment(hw::cluster_rank() + 1) - first_segment_;
    begin_ = warp_index() * count_ / plan.warps;
    end_ = (warp_index() + 1) * count_ / plan.warps;
  }

  CFPO_DEVICE void run() {
    for (int i = 0; i < plan_.slots; ++i) fetch_next();
    ClusterPlace before, now;
    while (true) {
      const bool more = Block::noted(now.number).row >= 0;
      if (more) {
        send_sums(now);
        // Into the slot of the row before the last, whose gradient has left it by now.
        if (now.number >= 2) fetch_next();
      }
      if (now.number >= 1) write_row(before);
      if (!more) break;
      before = now;
      now.advance(plan_.slots);
    }
    if (lane_index() == 0) hw::bulk_wait_read();
  }

 private:
  // Of a row that begins at `row`. A slice is a Segment of more columns: first column, columns,
  // shift.
  template <class Element>
  CFPO_DEVICE Segment<Element> slice(Element* row) const {
    const std::int64_t n_cols = logits().n_cols;
    Segment<Element> slice(row, n_cols, first_segment_);
    const std::int64_t left = n_cols - std::int64_t{first_segment_} * kSegmentColumns<T>;
    const int most = count_ * kSegmentColumns<T>;
    slice.count = left < most ? static_cast<int>(left) : most;
    return slice;
  }
  CFPO_DEVICE Segment<const T> logits_slice(const ClusterRow& row) const {
    return slice(static_cast<const T*>(row.logits));
  }
  CFPO_DEVICE char* slot(const ClusterPlace& place) const {
    return hw::shared_memory() + place.slot * plan_.shared.slot_bytes;
  }
  // The target's column within the slice, unless it is in another.
  CFPO_DEVICE int column_in_slice(const ClusterRow& row) const {
    return row.token >= 0 ? row.token - first_segment_ * kSegmentColumns<T> : -1;
  }

  // Where this warp's chunk ends within the slot.
  CFPO_DEVICE int chunk_end(const Segment<const T>& x) const {
    if (end_ < count_) return end_ * kSegmentBytes;
    const int bytes = x.shift + x.count * static_cast<int>(sizeof(T));
    return (bytes + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
  }

  // Starts to copy the next row that was noted; masked rows before it become zeros meanwhile.
  CFPO_DEVICE void fetch_next() {
    const ClusterRow row = Block::noted(fetched_.number);
    if (row.row >= 0) fetch(row);
    const int end = row.row < 0 ? n_rows() : row.row;
    for (; next_ < end; next_ += row_step_) zero_row(next_);
    if (row.row < 0) return;
    fetched_.advance(plan_.slots);
    next_ += row_step_;
  }

  CFPO_DEVICE void fetch(const ClusterRow& row) {
    hw::sync_warp();  // all lanes have done with the chunk
    if (lane_index() != 0) return;
    hw::bulk_wait_read();  // and its gradient has left it
    const Segment<const T> x = logits_slice(row);
    const int from = begin_ * kSegmentBytes;
    const int bytes = begin_ < end_ ? chunk_end(x) - from : 0;
    hw::barrier_arrive_expect(Block::full(fetched_.slot), bytes);
    if (bytes > 0) {
      hw::bulk_load(slot(fetched_) + from, reinterpret_cast<const char*>(x.begin) - x.shift + from,
                    bytes, Block::full(fetched_.slot), hw::read_once());
    }
  }

  CFPO_DEVICE void zero_row(int row) {
    const Segment<T> out = slice(static_cast<T*>(dlogits_.row(row)));
    for (int i = begin_; i < end_; ++i) write_zeros(Segment<T>(out.begin, out.count, i));
  }

  // The sums of this warp's segments, and the target's logit, go to every block of the cluster.
  CFPO_DEVICE void send_sums(const ClusterPlace& place) {
    const int number = place.number;
    const ClusterRow row = Block::noted(number);
    const Segment<const T> x = logits_slice(row);
    const int column = column_in_slice(row);
    hw::barrier_wait(Block::full(place.slot), place.parity);
    hw::barrier_wait(Block::vacant(Block::turn(number)), Block::parity(number) ^ 1);
    for (int i = begin_; i < end_; ++i) {
      const char* window = slot(place) + i * kSegmentBytes;
      const int target = column_in_segment<T>(column, i);
      const SegmentSum<kEntropy> part = sum_segment<T, kEntropy>(
          window, Segment<const T>(x.begin, x.count, i), target, row.scale);
      float logit = 0.0f;
      if (target >= 0) {
        logit = load_shared_element(reinterpret_cast<const T*>(window + x.shift) + target);
        hw::sync_warp();  // all have read it, before one of them sends what lets it be overwritten
      }
      // The next chunk's first vector was read too. Its worker may refill it, once all have sent
      // their sums, before this one comes to the fence of its gradient.
      if (x.shift != 0 && i + 1 == end_) {
        hw::fence_async();
        hw::sync_warp();
      }
      send(number, first_segment_ + i, Sent{part});
      if (target >= 0) send(number, plan_.n_segments, sent_logit(logit));
    }
  }
  static CFPO_DEVICE Sent sent_logit(float logit) {
    if constexpr (kEntropy) {
      return {logit, 0.0f, 0.0f, 0.0f};
    } else {
      return {{logit, 0.0f, 0.0f}};
    }
  }
  CFPO_DEVICE void send(int number, int index, const Sent& sum) {
    if (lane_index() >= plan_.cluster) return;
    Vector v;
    std::memcpy(&v, &sum, sizeof v);
    hw::send_peer(Block::sums(number) + index, lane_index(), v,
                  Block::exchange(Block::turn(number)));
  }

  CFPO_DEVICE void write_row(const ClusterPlace& place) {
    const int number = place.number;
    const ClusterRow row = Block::noted(number);
    const Segment<const T> x = logits_slice(row);
    const Segment<T> out = slice(static_cast<T*>(row.dlogits));
    const int column = column_in_slice(row);
    hw::barrier_wait(Block::ready(Block::turn(number)), Block::parity(number));
    const Gradient g = hw::read_shared(Block::gradient(number));
    char* const bytes = slot(place);
    if (out.shift == x.shift) {
      if (begin_ < end_) write_chunk(bytes, x, out, column, g);
      return;
    }
    // Nothing in the slot is where it has to be in memory.
    for (int i = begin_; i < end_; ++i) {
      const Segment<T> to(out.begin, out.count, i);
      const int target = column_in_segment<T>(column, i);
      const char* window = bytes + i * kSegmentBytes;
      write_gradient<T, kEntropy>(window, x.shift, to, target, without_peak(g));
      if constexpr (kEntropy) {
        if (first_segment_ + i == g.segment) {
          write_peak(window, x.shift, to, target, stage_, row.row, g);
        }
      }
    }
    hw::fence_async();
    hw::sync_threads(plan_.warps * kWarpThreads);  // the next chunk's first vector was read too
  }

  CFPO_DEVICE void write_chunk(char* bytes, const Segment<const T>& x, const Segment<T>& out,
                               int column, const Gradient& g) {
    constexpr int kSize = sizeof(T);
    // Columns [0, head) and [tail, count) have no whole vector to themselves.
    const int before = (kVectorBytes - x.shift) % kVectorBytes / kSize;
    const int head = before < x.count ? before : x.count;
    const int tail = head + (x.count - head) / kVectorElements<T> * kVectorElements<T>;
    const int from = begin_ == 0 ? x.shift + head * kSize : begin_ * kSegmentBytes;
    const int to = end_ == count_ ? x.shift + tail * kSize : end_ * kSegmentBytes;
    LanePeak peak;
    if constexpr (kEntropy) {
      // Before it is overwritten. A segment that is shifted ends in the next chunk.
      const int segment = g.segment - first_segment_;
      if (g.segment >= 0 && segment >= begin_ - 1 && segment < end_) {
        peak = peak_in_chunk(bytes, x, from, to, segment * kSegmentBytes, column, g.logit);
        hw::sync_warp();  // a lane looks at vectors that others overwrite
      }
    }
    for (int at = from + lane_index() * kVectorBytes; at < to; at += kWarpThreads * kVectorBytes) {
      float values[kVectorElements<T>];
      unpack<T>(hw::load_shared(bytes + at), values);
      gradient_vector<T, kEntropy>(values, (at - x.shift) / kSize, column, without_peak(g));
      hw::store_shared(bytes + at, pack<T>(values));
    }
    const T* columns = reinterpret_cast<const T*>(bytes + x.shift);
    if (begin_ == 0) write_elements(columns, out, 0, head, column, g);
    if (end_ == count_) write_elements(columns, out, tail, x.count, column, g);
    if constexpr (kEntropy) {
      if (g.segment >= 0) replace_peak(bytes, x, peak, g);
    }
    // For the bulk store, and for the load of another row: after all that is read here.
    hw::fence_async();
    hw::sync_warp();
    if (lane_index() == 0 && from < to) {
      hw::bulk_store(reinterpret_cast<char*>(out.begin) - out.shift + from, bytes + from, to - from,
                     hw::read_once());
      hw::bulk_commit();
    }
  }
  // Among the vectors [from, to) of the slot that a segment touches.
  CFPO_DEVICE LanePeak peak_in_chunk(const char* bytes, const Segment<const T>& x, int from, int to,
                                     int segment, int column, float least) {
    LanePeak peak;
    const int begin = segment > from ? segment : from;
    const int last = segment + kWindowBytes;
    const int end = last < to ? last : to;
    for (int at = begin + lane_index() * kVectorBytes; at < end;
         at += kWarpThreads * kVectorBytes) {
      const int first = (at - x.shift) / static_cast<int>(sizeof(T));
      peak.template look<T>(hw::load_shared(bytes + at), first, x.count, column, least);
    }
    return peak;
  }
  CFPO_DEVICE void replace_peak(char* bytes, const Segment<const T>& x, LanePeak peak,
                                const Gradient& g) {
    hw::sync_warp();  // another lane may have written there
    if (peak.column < 0) return;
    const int byte = x.shift + peak.column * static_cast<int>(sizeof(T));
    const int within = byte % kVectorBytes / static_cast<int>(sizeof(T));
    char* const vector = bytes + byte / kVectorBytes * kVectorBytes;
    const float value = peak.value(stage_, 0, g);
    float values[kVectorElements<T>];
    unpack<T>(hw::load_shared(vector), values);
    for (int j = 0; j < kVectorElements<T>; ++j) values[j] = j == within ? value : values[j];
    hw::store_shared(vector, pack<T>(values));
  }
  // Fewer than a vector.
  CFPO_DEVICE void write_elements(const T* columns, const Segment<T>& out, int first, int last,
                                  int column, const Gradient& g) {
    const int i = first + lane_index();
    if (i >= last) return;
    const float x = load_shared_element(columns + i);
    float value = gradient_at<kEntropy>(x, i, column, without_peak(g));
    if constexpr (kEntropy) {
      if (g.segment >= 0 && i != column && x >= g.logit) value = g.value;
    }
    store_element(out.begin + i, value);
  }

  int first_segment_;  // of the slice
  int count_;          // of its segments
  int begin_, end_;    // those of them that this warp has
  int next_;           // first row that is neither fetched nor zeroed
  ClusterPlace fetched_;
};

template <class T, class Stage, bool kEntropy>
CFPO_DEVICE void run_cluster_block(const Stage& stage, const Rows& dlogits,
                                   const ClusterPlan& plan) {
  const bool works = warp_index() < plan.warps;
  ClusterAccountant<T, Stage, kEntropy> accountant(stage, dlogits, plan);
  if (!works) accountant.begin();
  // From here on the barriers exist, and all blocks run, so that others may write into them.
  hw::cluster_arrive();
  hw::cluster_wait();
  if (works) {
    ClusterWorker<T, Stage, kEntropy>(stage, dlogits, plan).run();
  } else {
    accountant.run();
  }
  // Until nobody writes to anybody any more.
  hw::cluster_arrive();
  hw::cluster_wait();
}

template <class T, class Stage, bool kEntropy>
CFPO_KERNEL(kClusterThreads, 1)
cluster_kernel(CFPO_ARGUMENT Stage stage, CFPO_ARGUMENT Rows dlogits,
               CFPO_ARGUMENT ClusterPlan plan) {
  if constexpr (hw::kHasClusters) {
    run_cluster_block<T, Stage, kEntropy>(stage, dlogits, plan);
  } else {
    hw::stop();
  }
}

}  // namespace cfpo::cuda
