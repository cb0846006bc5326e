// The policy term by itself, for mistakes that tests plant in core/objective.h.
#include "core/objective.h"

extern "C" void policy_term(int shape, const double* numbers, const double* token, double* term) {
  cfpo::Policy policy;
  policy.shape = static_cast<cfpo::Shape>(shape);
  for (const auto& [name, member] : cfpo::kPolicyNumbers) policy.*member = *numbers++;
  cfpo::Token t{};
  t.logp = token[0];
  t.log_ratio = token[1];
  t.advantage = token[2];
  t.token_weight = token[3];
  t.weight = 1;
  t.low = policy.low(t.advantage);
  t.high = policy.high(t.advantage);
  const cfpo::TokenLoss loss =
      cfpo::token_loss(policy, {cfpo::KlEstimator::kK3, false, 0, 0}, t);
  term[0] = loss.loss;
  term[1] = loss.dlogp;
}

extern "C" void kl_term(int estimator, int weighted, double d, double log_ratio, double* term) {
  const cfpo::Term kl = cfpo::kl_term(
      {static_cast<cfpo::KlEstimator>(estimator), weighted != 0, 1, 0}, d, log_ratio);
  term[0] = kl.loss;
  term[1] = kl.dlogp;
}
