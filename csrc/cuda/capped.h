// Logits behind a softcap make a stage a type of its own, so that the kernels of the others have
// nothing of it.
#pragma once

namespace cfpo::cuda {

template <class Stage>
struct Capped : Stage {};

template <class Stage>
constexpr bool kCapped = false;
template <class Stage>
constexpr bool kCapped<Capped<Stage>> = true;

}  // namespace cfpo::cuda
