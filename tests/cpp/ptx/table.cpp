// The forms that the interpreter knows, each with what does it. Nothing else runs: a form that is
// missing here is an error of the parser.
#include <algorithm>
#include <unordered_map>

#include "ptx/arithmetic.h"
#include "ptx/async_instructions.h"

namespace ptx {
namespace {

using Table = std::unordered_map<std::string, Form>;

void add_arithmetic(Table& t) {
  t["add.s32 rrr"] = {binary<i32, Add>};
  t["add.s64 rrr"] = {binary<i64, Add>};
  t["add.rn.f32 rrr"] = {binary<f32, Add>};
  t["add.rn.f64 rrr"] = {binary<f64, Add>};
  t["sub.s32 rrr"] = {binary<i32, Sub>};
  t["sub.s64 rrr"] = {binary<i64, Sub>};
  t["sub.rn.f32 rrr"] = {binary<f32, Sub>};
  t["sub.rn.f64 rrr"] = {binary<f64, Sub>};
  t["mul.lo.s32 rrr"] = {binary<i32, Mul>};
  t["mul.lo.s64 rrr"] = {binary<i64, Mul>};
  t["mul.rn.f32 rrr"] = {binary<f32, Mul>};
  t["mul.rn.f64 rrr"] = {binary<f64, Mul>};
  t["mul.wide.s32 rrr"] = {multiply_wide<i32, i64>};
  t["mul.wide.u32 rrr"] = {multiply_wide<u32, u64>};
  t["mul.wide.u16 rrr"] = {multiply_wide<u16, u32>};
  t["mad.lo.s32 rrrr"] = {multiply_add<i32>};
  t["mad.lo.s64 rrrr"] = {multiply_add<i64>};
  t["mad.wide.s32 rrrr"] = {multiply_wide_add<i32, i64>};
  t["mad.wide.u32 rrrr"] = {multiply_wide_add<u32, u64>};
  t["fma.rn.f32 rrrr"] = {multiply_add<f32>};
  t["fma.rn.f64 rrrr"] = {multiply_add<f64>};
  t["div.s32 rrr"] = {binary<i32, Division<false>>};
  t["div.u32 rrr"] = {binary<u32, Division<false>>};
  t["div.s64 rrr"] = {binary<i64, Division<false>>};
  t["div.rn.f32 rrr"] = {binary<f32, Division<false>>};
  t["div.rn.f64 rrr"] = {binary<f64, Division<false>>};
  t["div.full.f32 rrr"] = {divide_approx};
  t["div.approx.ftz.f32 rrr"] = {divide_approx};
  t["rem.s32 rrr"] = {binary<i32, Division<true>>};
  t["max.s32 rrr"] = {binary<i32, Extreme<true>>};
  t["max.s64 rrr"] = {binary<i64, Extreme<true>>};
  t["max.f32 rrr"] = {binary<f32, Extreme<true>>};
  t["max.f64 rrr"] = {binary<f64, Extreme<true>>};
  t["max.f16x2 rrr"] = {max_pair<to_half, from_half>};
  t["max.bf16x2 rrr"] = {max_pair<to_bf16, from_bf16>};
  t["min.f32 rrr"] = {binary<f32, Extreme<false>>};
  t["min.f64 rrr"] = {binary<f64, Extreme<false>>};
  t["min.s32 rrr"] = {binary<i32, Extreme<false>>};
  t["min.s64 rrr"] = {binary<i64, Extreme<false>>};
  t["neg.s32 rr"] = {unary<i32, Neg>};
  t["neg.f32 rr"] = {unary<f32, Neg>};
  t["neg.f64 rr"] = {unary<f64, Neg>};
  t["abs.f32 rr"] = {absolute<f32>};
  t["abs.f64 rr"] = {absolute<f64>};
  t["abs.f16 rr"] = {absolute16<0x7C00>};
  t["abs.bf16 rr"] = {absolute16<0x7F80>};
  t["abs.f16x2 rr"] = {absolute_pair<0x7C00>};
  t["abs.bf16x2 rr"] = {absolute_pair<0x7F80>};
  t["copysign.f32 rrr"] = {binary<f32, Copysign>};
  t["copysign.f64 rrr"] = {binary<f64, Copysign>};
  t["rcp.rn.f64 rr"] = {unary<f64, Reciprocal>};
  t["ex2.approx.ftz.f32 rr"] = {exp2_approx};
  t["rcp.approx.ftz.f64 rr"] = {reciprocal_approx};
}

void add_bits(Table& t) {
  t["and.b16 rrr"] = {binary<u16, std::bit_and<>>};
  t["and.b32 rrr"] = {binary<u32, std::bit_and<>>};
  t["and.b64 rrr"] = {binary<u64, std::bit_and<>>};
  t["or.b16 rrr"] = {binary<u16, std::bit_or<>>};
  t["or.b32 rrr"] = {binary<u32, std::bit_or<>>};
  t["or.b64 rrr"] = {binary<u64, std::bit_or<>>};
  t["xor.b32 rrr"] = {binary<u32, std::bit_xor<>>};
  t["not.b32 rr"] = {unary<u32, std::bit_not<>>};
  t["not.b64 rr"] = {unary<u64, std::bit_not<>>};
  t["and.pred rrr"] = {logic<std::bit_and<>>};
  t["or.pred rrr"] = {logic<std::bit_or<>>};
  t["xor.pred rrr"] = {logic<std::bit_xor<>>};
  t["not.pred rr"] = {not_predicate};
  t["shl.b16 rrr"] = {shift_left<u16>};
  t["shl.b32 rrr"] = {shift_left<u32>};
  t["shl.b64 rrr"] = {shift_left<u64>};
  t["shr.s32 rrr"] = {shift_right<i32>};
  t["shr.s64 rrr"] = {shift_right<i64>};
  t["shr.u32 rrr"] = {shift_right<u32>};
  t["shr.u64 rrr"] = {shift_right<u64>};
  t["shf.r.wrap.b32 rrrr"] = {funnel_shift_right};
  t["bfe.u32 rrrr"] = {extract_bits};
  t["brev.b32 rr"] = {reverse_bits};
  t["bfind.shiftamt.u32 rr"] = {leading_zeros};
}

// Those comparisons of a type that occur; the numbers are set_predicate's.
void add_setp(Table& table, const std::string& type, const std::vector<std::string>& names,
              Execute execute) {
  static const std::map<std::string, int> kTrue{
      {"eq", 2},   {"ne", 5},  {"lt", 1},   {"le", 3},   {"gt", 4},   {"ge", 6},  {"equ", 10},
      {"neu", 13}, {"ltu", 9}, {"leu", 11}, {"gtu", 12}, {"geu", 14}, {"num", 7}, {"nan", 8}};
  const std::string operands = type.find("x2") != std::string::npos ? " prr" : " rrr";
  for (const std::string& name : names) {
    table["setp." + name + "." + type + operands] = {execute, kTrue.at(name)};
  }
}
void add_comparisons(Table& t) {
  add_setp(t, "b16", {"ne"}, set_predicate<u16>);
  add_setp(t, "b32", {"eq", "ne"}, set_predicate<u32>);
  add_setp(t, "b64", {"eq", "ne"}, set_predicate<u64>);
  add_setp(t, "s16", {"eq", "ne", "gt"}, set_predicate<i16>);
  add_setp(t, "s32", {"eq", "ne", "lt", "le", "gt", "ge"}, set_predicate<i32>);
  add_setp(t, "s64", {"eq", "ne", "lt", "le", "gt", "ge"}, set_predicate<i64>);
  add_setp(t, "u32", {"lt", "gt", "ge"}, set_predicate<u32>);
  add_setp(t, "u64", {"lt", "gt"}, set_predicate<u64>);
  add_setp(t, "f32",
           {"eq", "ne", "lt", "le", "gt", "ge", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"},
           set_predicate<f32>);
  add_setp(t, "f64",
           {"eq", "ne", "lt", "gt", "ge", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"},
           set_predicate<f64>);
  add_setp(t, "f64", {"le"}, set_predicate<f64>);
  add_setp(t, "f16", {"lt"}, set_predicate16<from_half>);
  add_setp(t, "bf16", {"lt"}, set_predicate16<from_bf16>);
  add_setp(t, "f16x2", {"lt"}, set_predicate_pair<from_half>);
  add_setp(t, "bf16x2", {"lt"}, set_predicate_pair<from_bf16>);
  for (const char* type : {"b16", "u16"}) t["selp." + std::string(type) + " rrrr"] = {select<u16>};
  for (const char* type : {"b32", "u32", "f32"}) {
    t["selp." + std::string(type) + " rrrr"] = {select<u32>};
  }
  for (const char* type : {"b64", "f64"}) t["selp." + std::string(type) + " rrrr"] = {select<u64>};
}

void add_conversions(Table& t) {
  t["cvt.s64.s32 rr"] = {convert<i64, i32>};
  t["cvt.u16.u32 rr"] = {convert<u16, u32>};
  t["cvt.u32.u64 rr"] = {convert<u32, u64>};
  t["cvt.u64.u32 rr"] = {convert<u64, u32>};
  t["cvt.f64.f32 rr"] = {convert_float<f64, f32>};
  t["cvt.rn.f32.f64 rr"] = {convert_float<f32, f64>};
  t["cvt.rn.f64.s32 rr"] = {convert_float<f64, i32>};
  t["cvt.rn.f64.s64 rr"] = {convert_float<f64, i64>};
  t["cvt.rzi.s64.f32 rr"] = {truncate<i64, f32>};
  t["cvt.rzi.s32.f32 rr"] = {truncate<i32, f32>};
  t["cvt.rzi.s32.f64 rr"] = {truncate<i32, f64>};
  t["cvt.rzi.s64.f64 rr"] = {truncate<i64, f64>};
  t["cvt.rpi.f32.f32 rr"] = {round_float<f32, std::ceil, false>};
  t["cvt.rpi.ftz.f32.f32 rr"] = {round_float<f32, std::ceil, true>};
  t["cvt.rmi.ftz.f32.f32 rr"] = {round_float<f32, std::floor, true>};
  t["cvt.rpi.f64.f64 rr"] = {round_float<f64, std::ceil, false>};
  t["cvt.rmi.f64.f64 rr"] = {round_float<f64, std::floor, false>};
  t["cvt.f32.f16 rr"] = {convert_half<f32>};
  t["cvt.f64.f16 rr"] = {convert_half<f64>};
  t["cvt.f32.bf16 rr"] = {convert_bf16<f32>};
  t["cvt.f64.bf16 rr"] = {convert_bf16<f64>};
  t["cvt.rn.f16.f32 rr"] = {convert_narrow<to_half>};
  t["cvt.rn.bf16.f32 rr"] = {convert_narrow<to_bf16>};
  t["cvt.rn.f16x2.f32 rrr"] = {convert_pair<to_half>};
  t["cvt.rn.bf16x2.f32 rrr"] = {convert_pair<to_bf16>};
}

void add_moves(Table& t) {
  for (const char* type : {"b16", "u16"}) t["mov." + std::string(type) + " rr"] = {move<u16>};
  for (const char* type : {"b32", "u32", "f32"})
    t["mov." + std::string(type) + " rr"] = {move<u32>};
  for (const char* type : {"b64", "u64", "f64"})
    t["mov." + std::string(type) + " rr"] = {move<u64>};
  t["mov.pred rr"] = {move_predicate};
  t["mov.b32 2r"] = {unpack<u16, 2>};
  t["mov.b32 r2"] = {pack<u16, 2>};
  t["mov.b64 2r"] = {unpack<u32, 2>};
  t["mov.b64 r2"] = {pack<u32, 2>};
  // Generic addresses of global memory, and of parameters, are these themselves.
  t["cvta.to.global.u64 rr"] = {move<u64>};
  t["cvta.shared.u64 rr"] = {to_generic};
  t["cvta.to.shared.u64 rr"] = {from_generic_shared};
  t["mapa.shared::cluster.u32 rrr"] = {map_address};
  for (const char* priority : {"first", "last", "normal"}) {
    t["createpolicy.fractional.L2::evict_" + std::string(priority) + ".b64 rr"] = {create_policy};
  }
}

// `name` is all before the vector's size; `hint` is the letter of a cache policy, which changes
// nothing.
template <class T, Space kSpace, int kElements>
void add_load(Table& table, const std::string& name, const std::string& type, const char* hint) {
  const std::string n = kElements > 1 ? std::to_string(kElements) : "r";
  const std::string vector = kElements > 1 ? ".v" + n : "";
  table["ld" + name + vector + "." + type + " " + n + "m" + hint] = {load<T, kSpace, kElements>};
}
template <class T, Space kSpace, int kElements>
void add_store(Table& table, const std::string& name, const std::string& type, const char* hint) {
  const std::string n = kElements > 1 ? std::to_string(kElements) : "r";
  const std::string vector = kElements > 1 ? ".v" + n : "";
  table["st" + name + vector + "." + type + " m" + n + hint] = {store<T, kSpace, kElements>};
}
template <class T, Space kSpace, int kElements = 1>
void add_access(Table& table, const std::string& name, const std::string& type) {
  add_load<T, kSpace, kElements>(table, name, type, "");
  add_store<T, kSpace, kElements>(table, name, type, "");
}

void add_global_accesses(Table& t) {
  constexpr Space kGlobal = Space::kGlobal;
  for (const char* type : {"b16", "u16"}) add_access<u16, kGlobal>(t, ".global", type);
  for (const char* type : {"b32", "u32", "f32"}) {
    add_access<u32, kGlobal>(t, ".global", type);
    add_access<u32, kGlobal, 4>(t, ".global", type);
  }
  for (const char* type : {"b64", "u64", "f64"}) add_access<u64, kGlobal>(t, ".global", type);
  add_access<u32, kGlobal>(t, ".volatile.global", "u32");
  add_store<u16, kGlobal, 1>(t, ".global.cs", "u16", "");
  add_store<u32, kGlobal, 1>(t, ".global.cs", "f32", "");
  add_store<u32, kGlobal, 4>(t, ".global.cs", "u32", "");
  for (const char* priority : {"first", "last"}) {
    const std::string hinted = std::string(".global.L1::evict_") + priority + ".L2::cache_hint";
    add_load<u16, kGlobal, 1>(t, hinted, "b16", "r");
    add_load<u32, kGlobal, 1>(t, hinted, "b32", "r");
    add_load<u32, kGlobal, 4>(t, hinted, "b32", "r");
    add_store<u16, kGlobal, 1>(t, hinted, "b16", "r");
    add_store<u32, kGlobal, 1>(t, hinted, "b32", "r");
    add_store<u32, kGlobal, 4>(t, hinted, "b32", "r");
  }
}
void add_other_accesses(Table& t) {
  constexpr Space kShared = Space::kShared, kParam = Space::kParam;
  add_access<u16, kShared>(t, ".shared", "u16");
  for (const char* type : {"b32", "u32", "f32"}) {
    add_access<u32, kShared>(t, ".shared", type);
    add_access<u32, kShared, 2>(t, ".shared", type);
    add_access<u32, kShared, 4>(t, ".shared", type);
  }
  for (const char* type : {"b64", "u64", "f64"}) add_access<u64, kShared>(t, ".shared", type);
  for (const char* type : {"u64", "f64"}) add_access<u64, kShared, 2>(t, ".shared", type);
  add_access<u32, kShared>(t, ".volatile.shared", "u32");
  add_access<u32, Space::kGeneric>(t, "", "u32");
  add_load<i8, kParam, 1>(t, ".param", "s8", "");
  add_load<u8, kParam, 1>(t, ".param", "u8", "");
  for (const char* type : {"b32", "u32", "s32", "f32"}) {
    add_load<u32, kParam, 1>(t, ".param", type, "");
  }
  add_load<u32, kParam, 2>(t, ".param", "f32", "");
  for (const char* type : {"b64", "u64", "f64"}) add_load<u64, kParam, 1>(t, ".param", type, "");
}

void add_synchronisation(Table& t) {
  t["bra"] = t["bra.uni"] = {branch};
  t["ret"] = {end};
  t["trap"] = {trap};
  t["bar.warp.sync r"] = {warp_barrier};
  t["shfl.sync.bfly.b32 rrrrr"] = {shuffle, static_cast<int>(Shuffle::kButterfly)};
  t["shfl.sync.bfly.b32 prrrr"] = {shuffle_with_predicate, static_cast<int>(Shuffle::kButterfly)};
  t["shfl.sync.idx.b32 prrrr"] = {shuffle_with_predicate, static_cast<int>(Shuffle::kIndex)};
  t["vote.sync.ballot.b32 rrr"] = {vote_ballot};
  t["redux.sync.max.s32 rrr"] = {reduce_max};
  t["bar.sync r"] = t["barrier.sync r"] = {block_barrier_of_all};
  t["barrier.sync rr"] = {block_barrier};
  t["barrier.cluster.arrive.release"] = {cluster_arrive<true>};
  t["barrier.cluster.arrive.relaxed"] = {cluster_arrive<false>};
  t["barrier.cluster.wait.acquire"] = {cluster_wait};
  // Here all see what one has written at once; what is not ordered is a race.
  t["fence.mbarrier_init.release.cluster"] = {nothing};
  t["fence.proxy.async.shared::cta"] = {fence_async_proxy};
  t["mbarrier.init.shared::cta.b64 mr"] = {mbarrier_init};
  t["mbarrier.arrive.shared::cta.b64 rm"] = {mbarrier_arrive};
  t["mbarrier.arrive.shared::cluster.b64 rm"] = {mbarrier_arrive_peer};
  t["mbarrier.arrive.expect_tx.shared::cta.b64 rmr"] = {mbarrier_arrive_expecting};
  t["mbarrier.expect_tx.relaxed.cta.shared::cta.b64 mr"] = {mbarrier_expect};
  t["mbarrier.try_wait.parity.shared::cta.b64 rmr"] = {mbarrier_try_wait};
}
void add_copies(Table& t) {
  t["cp.async.cg.shared.global.L2::cache_hint mmrr"] = {copy_async16};
  t["cp.async.commit_group"] = {commit_copies};
  t["cp.async.wait_group r"] = {wait_copies};
  t["cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint mmrmr"] = {
      bulk_load};
  t["cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint mmrr"] = {bulk_store};
  t["cp.async.bulk.commit_group"] = {commit_bulk};
  t["cp.async.bulk.wait_group.read r"] = {wait_bulk_read};
  t["st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 m4m"] = {store_async};
}

const Table& table() {
  static const Table all = [] {
    Table t;
    for (const auto add :
         {add_arithmetic, add_bits, add_comparisons, add_conversions, add_moves,
          add_global_accesses, add_other_accesses, add_synchronisation, add_copies}) {
      add(t);
    }
    return t;
  }();
  return all;
}

}  // namespace

const Form* find_form(const std::string& form) {
  const auto found = table().find(form);
  return found == table().end() ? nullptr : &found->second;
}

std::vector<std::string> all_forms() {
  std::vector<std::string> forms;
  for (const auto& [form, _] : table()) forms.push_back(form);
  std::sort(forms.begin(), forms.end());
  return forms;
}

}  // namespace ptx
