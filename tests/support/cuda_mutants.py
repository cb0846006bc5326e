"""Mistakes in the CUDA kernels that tests must find: each is the source with one line changed."""

from __future__ import annotations

from typing import NamedTuple

from emulation import SANITIZE


class Mutant(NamedTuple):
    file: str
    line: str
    planted: str
    flags: list[str] = []  # noqa: RUF012  # never changed
    found: str = ""  # what the emulation says


ROW, SEGMENT, SPLIT, ELEMENTS, CLUSTER, TRANSIENT = (
    "row_kernel.cuh",
    "segment.cuh",
    "split_kernels.cuh",
    "elements.cuh",
    "cluster_kernel.cuh",
    "transient_kernel.cuh",
)
UNFENCED = "over bytes whose reader has not fenced them"
RAGGED_ENDS = """\
    if (begin_ == 0) write_elements(columns, out, 0, head, column, g);
    if (end_ == count_) write_elements(columns, out, tail, x.count, column, g);
    if constexpr (kEntropy) {
      if (g.segment >= 0) replace_peak(bytes, x, peak, g);
    }
"""
FENCE = """\
    // For the bulk store, and for the load of another row: after all that is read here.
    hw::fence_async();
    hw::sync_warp();
"""
MUTANTS = {
    "sums merged before all have come": Mutant(
        ROW, "    hw::sync_block();\n    if (Stage::kSums) {", "    if (Stage::kSums) {"
    ),
    "gradient written before its coefficients": Mutant(
        ROW, "    hw::sync_block();\n  }\n  CFPO_DEVICE RowStats", "  }\n  CFPO_DEVICE RowStats"
    ),
    "other lanes' copies not waited for": Mutant(
        ROW,
        "    hw::wait_copies(--under_way_);\n    hw::sync_warp();",
        "    hw::wait_copies(--under_way_);",
    ),
    "copies not waited for": Mutant(ROW, "hw::wait_copies(--under_way_);", "--under_way_;"),
    "a window refilled while it is read": Mutant(
        ROW, "    hw::sync_warp();\n    fetch_segment", "    fetch_segment"
    ),
    "a barrier that some warps miss": Mutant(
        ROW, "    hw::sync_block();\n    if (Stage::kSums) {",
        "    if (part() == 0) hw::sync_block();\n    if (Stage::kSums) {",
    ),
    "a segment taken from a window that has another": Mutant(
        ROW,
        "i >= count() - kRing);\n      if (!in_window)",
        "i >= count() - kRing - 1);\n      if (!in_window)",
    ),
    "split: coefficients used before they are there": Mutant(
        SPLIT, "  hw::wait_copies(0);\n  hw::sync_block();", "  hw::wait_copies(0);"
    ),
    "the tail is missing": Mutant(SEGMENT, "ragged = head + out.count - tail", "ragged = head"),
    "the head is missing": Mutant(
        SEGMENT, "if (lane_index() < ragged)", "if (lane_index() < ragged && lane_index() >= head)"
    ),
    "a vector written past the end": Mutant(
        SEGMENT, "(out.count - head) / kElements", "(out.count - head + kElements - 1) / kElements"
    ),
    "a vector read past the end": Mutant(
        SEGMENT, "i < bytes; i +=", "i < bytes + kVectorBytes; i +=", SANITIZE
    ),
    "columns past the end summed": Mutant(
        SEGMENT, "if (j >= left || j == target)", "if (j == target)"
    ),
    "the target summed twice": Mutant(
        SEGMENT, "if (j >= left || j == target)", "if (j >= left)"
    ),
    "a peak summed with the others": Mutant(
        SEGMENT, "column != skip && x[j] != peak;", "column != skip;"
    ),
    "a row's peak merged with its others": Mutant(
        SEGMENT, "      part.sum = from.rest;\n", ""
    ),
    "a peak's gradient left to the sweep": Mutant(ROW, "if (kPeaks && (", "if (false && ("),
    "split: a peak's gradient left to the sweep": Mutant(
        SPLIT, "if (Stage::kGradient && (", "if (false && ("
    ),
    "cluster: a peak's gradient left to the sweep": Mutant(
        CLUSTER, "if (g.segment >= 0) replace_peak(bytes, x, peak, g);", ""
    ),
    "cluster: a peak in the next chunk's first vector": Mutant(
        CLUSTER, "segment >= begin_ - 1 &&", "segment >= begin_ &&"
    ),
    "a shift by 4 bytes forgotten": Mutant(ELEMENTS, "if (shift & 4)", "if (false)"),
    "cluster: sums merged before all have come": Mutant(
        CLUSTER, "    hw::barrier_wait(Block::exchange(turn), Block::parity(number));\n", ""
    ),
    "cluster: one block launched without a cluster": Mutant(
        "run.cuh", "      launch(\"cluster_kernel\",",
        "      if (plan.cluster == 1) grid.cluster = 0;\n      launch(\"cluster_kernel\",",
    ),
    "cluster: a block written to before it runs": Mutant(
        CLUSTER, "  hw::cluster_wait();\n  if (works)", "  if (works)"
    ),
    "cluster: a block written to after it ended": Mutant(
        CLUSTER, "  hw::cluster_arrive();\n  hw::cluster_wait();\n}", "}"
    ),
    "cluster: sums overwritten while they are merged": Mutant(
        CLUSTER, "hw::barrier_wait(Block::vacant(Block::turn(number)),", "static_cast<void>("
    ),
    "cluster: coefficients used before they are there": Mutant(
        CLUSTER, "hw::barrier_wait(Block::ready(Block::turn(number)), Block::parity(number));", ""
    ),
    "cluster: coefficients overwritten while they are used": Mutant(
        CLUSTER, "plan_.shared.gradients) + turn(number)", "plan_.shared.gradients)"
    ),
    "cluster: a slot read before it is full": Mutant(
        CLUSTER, "    hw::barrier_wait(Block::full(place.slot), place.parity);\n", ""
    ),
    "cluster: the phase of the round before": Mutant(CLUSTER, "      parity ^= 1;\n", ""),
    "cluster: a slot refilled before its row was written": Mutant(
        CLUSTER, "if (now.number >= 2) fetch_next();", "if (now.number >= 1) fetch_next();"
    ),
    "cluster: a slot refilled before its gradient left": Mutant(
        CLUSTER, "    hw::bulk_wait_read();  // and", "    // and"
    ),
    "cluster: a chunk refilled while its neighbour reads": Mutant(
        CLUSTER, "    hw::sync_threads(plan_.warps * kWarpThreads);", ""
    ),
    "cluster: a worker without a segment falls behind": Mutant(
        "plan.cpp", "std::min(n_segments / plan.cluster,", "std::min(plan.slice_segments(),"
    ),
    "cluster: notes overwritten while they are read": Mutant(
        "plan.h", "kClusterNotes = 16;", "kClusterNotes = 4;"
    ),
    "cluster: rows noted after they are fetched": Mutant(
        CLUSTER, "(plan_.slots + kAccountants - 1) / kAccountants", "plan_.slots / kAccountants"
    ),
    "cluster: an accountant takes the rows of the other": Mutant(
        CLUSTER, "for (int i = 0; i < which_; ++i) {", "for (int i = 0; i < 0; ++i) {"
    ),
    "cluster: the target is not sent": Mutant(
        CLUSTER, "if (target >= 0) send(", "if (target > 0) send("
    ),
    "cluster: bytes of other lanes stored before they are there": Mutant(
        CLUSTER, "    hw::sync_warp();\n    if (lane_index() == 0 && from < to)",
        "    if (lane_index() == 0 && from < to)",
    ),
    "cluster: bytes stored that are not fenced": Mutant(CLUSTER, FENCE, "    hw::sync_warp();\n"),
    "cluster: sums that were merged are not fenced": Mutant(
        CLUSTER, "    hw::fence_async();\n    hw::sync_warp();  // all lanes",
        "    hw::sync_warp();  // all lanes",
        found=f"a message {UNFENCED}",
    ),
    "cluster: the next chunk, read for a sum, is not fenced": Mutant(
        CLUSTER, "        hw::fence_async();\n        hw::sync_warp();", "        hw::sync_warp();",
        found=f"a bulk load {UNFENCED}",
    ),
    "cluster: the next chunk, read for the target, is not fenced": Mutant(
        CLUSTER, "      if (target >= 0) send(number, plan_.n_segments, sent_logit(",
        """      if (target >= 0) {
        logit = load_shared_element(reinterpret_cast<const T*>(window + x.shift) + target);
      }
      if (target >= 0) send(number, plan_.n_segments, sent_logit(""",
        found=f"a bulk load {UNFENCED}",
    ),
    "cluster: the next chunk, read for a gradient, is not fenced": Mutant(
        CLUSTER, "    hw::fence_async();\n    hw::sync_threads(", "    hw::sync_threads(",
        found=f"a bulk load {UNFENCED}",
    ),
    "cluster: ragged ends are not fenced": Mutant(
        CLUSTER, RAGGED_ENDS + FENCE, FENCE + RAGGED_ENDS, found=f"a bulk load {UNFENCED}"
    ),
    "cluster: left with stores under way": Mutant(
        CLUSTER, "    if (lane_index() == 0) hw::bulk_wait_read();\n", ""
    ),
    "cluster: a masked row takes a slot": Mutant(
        CLUSTER, "const bool active = exists && !stage_.skip(row);", "const bool active = exists;"
    ),
    "cluster: a masked row's gradient is forgotten": Mutant(
        CLUSTER, "row.row < 0 ? n_rows() : row.row;", "row.row < 0 ? next_ : row.row;"
    ),
    "cluster: a masked row's scalars are forgotten": Mutant(CLUSTER, "stage_.skipped(row);", ""),
    "cluster: 32 masked rows taken for the end": Mutant(
        CLUSTER, "while (left_ == 0 && next_ <", "if (left_ == 0 && next_ <"
    ),
    "cluster: rows left out that are looked at later": Mutant(
        CLUSTER, "> kWarpThreads * row_step_ ?", "> 2 * kWarpThreads * row_step_ ?"
    ),
    "cluster: waits for the logit of a token that does not exist": Mutant(
        CLUSTER, "plan_.n_segments + (row.token >= 0 ? 1 : 0)", "plan_.n_segments + 1"
    ),
    "cluster: the head is missing": Mutant(
        CLUSTER, "if (begin_ == 0) write_elements", "if (false) write_elements"
    ),
    "cluster: the tail is missing": Mutant(
        CLUSTER, "if (end_ == count_) write_elements", "if (false) write_elements"
    ),
    "cluster: a neighbour's bytes written at the end": Mutant(
        CLUSTER, "end_ == count_ ? x.shift + tail * kSize",
        "end_ == count_ ? x.count > 99 ? chunk_end(x) : x.shift + tail * kSize",
    ),
    "cluster: a neighbour's bytes written at the beginning": Mutant(
        CLUSTER, "begin_ == 0 ? x.shift + head * kSize",
        "begin_ == 0 ? x.count > 99 ? 0 : x.shift + head * kSize",
    ),
    "cluster: a vector read past the end": Mutant(
        CLUSTER, "const int bytes = begin_ < end_ ? chunk_end(x) - from : 0;",
        "const int bytes = begin_ < end_ ? (end_ - begin_) * kSegmentBytes + kVectorBytes : 0;",
        SANITIZE,
    ),
    "transient: copies not waited for": Mutant(
        TRANSIENT, "      hw::wait_copies(--later);\n", "      --later;\n"
    ),
    "transient: other lanes' copies not waited for": Mutant(
        TRANSIENT, "(--later);\n      hw::sync_warp();", "(--later);"
    ),
    "transient: sums merged before all have come": Mutant(
        TRANSIENT, "    hw::barrier_wait(sums_came(), 0);\n", ""
    ),
    "transient: coefficients used before they are there": Mutant(
        TRANSIENT, "    hw::barrier_wait(coefs_came(), 0);\n", ""
    ),
    "transient: a block written to before it runs": Mutant(
        TRANSIENT, "    hw::cluster_wait();\n", ""
    ),
    "transient: fewer sums expected than are sent": Mutant(
        TRANSIENT, "sums_came(), plan_.n_segments *", "sums_came(), (plan_.n_segments - 1) *"
    ),
    "transient: one block launched without a cluster": Mutant(
        "run.cuh", "  grid.cluster = plan.cluster;\n  grid.threads = plan.warps * kWarpThreads;",
        "  if (plan.cluster > 1) grid.cluster = plan.cluster;\n"
        "  grid.threads = plan.warps * kWarpThreads;",
    ),
    "transient: a masked row is read": Mutant(
        TRANSIENT, "if (stage_.skip(row_)) return", "if (false) return"
    ),
    "transient: a masked row's gradient is forgotten": Mutant(
        TRANSIENT, "write_zeros(segment(out, i));", "static_cast<void>(out);"
    ),
    "transient: a masked row's scalars are forgotten": Mutant(
        TRANSIENT, "stage_.skipped(row_);", "static_cast<void>(0);"
    ),
    "transient: the target of the first column is absent": Mutant(
        TRANSIENT, "&& token_ >= 0) target", "&& token_ > 0) target"
    ),
    "transient: slices that overlap": Mutant(
        TRANSIENT, "first_(plan.first_segment(hw::cluster_rank())),",
        "first_(plan.first_segment(hw::cluster_rank()) - (hw::cluster_rank() > 1 ? 1 : 0)),",
    ),
}  # fmt: skip

# One of each way to go wrong: these are planted at every run of the tests, the others nightly.
ALWAYS = {
    "copies not waited for",
    "a window refilled while it is read",
    "split: coefficients used before they are there",
    "the tail is missing",
    "a shift by 4 bytes forgotten",
    "cluster: sums merged before all have come",
    "cluster: a slot read before it is full",
    "cluster: bytes stored that are not fenced",
    "cluster: left with stores under way",
    "cluster: a masked row's gradient is forgotten",
    "cluster: a neighbour's bytes written at the end",
    "transient: sums merged before all have come",
    "transient: fewer sums expected than are sent",
}
