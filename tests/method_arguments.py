"""An example of every input that a row of the catalogue names: small, and of the right kind.

``kind`` says which of the examples a call of the catalogue takes for a parameter.
"""

from __future__ import annotations

import torch

from fastpo import diffusion
from fastpo.data.pairs import Pairs
from fastpo.data.trees import Tree

B, K, T, H = 3, 4, 5, 8  # pairs or prompts, responses of each, tokens, hidden size
N = B * K  # responses in one row


def _sums(*shape):
    return lambda: -1 - 20 * torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _counts(*shape):
    return lambda: torch.full(shape, T)


def _mask(*shape):
    return lambda: torch.ones(shape, dtype=torch.bool)


def _normal(*shape):
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _probabilities(*shape):
    return lambda: torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 0.8 + 0.1


def _integers(high, *shape):
    return lambda: torch.randint(high, shape, generator=torch.Generator().manual_seed(3))


def _preferences():
    table = _normal(B, K, K)()
    return torch.sigmoid(table - table.mT)


PAIR_SUMS = (
    "policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "extra", "ref_extra",
    "slow_chosen", "slow_rejected", "guided_chosen", "guided_rejected", "old_policy",
    "chosen_given_rejected", "rejected_given_chosen", "chosen_given_chosen",
    "rejected_given_rejected", "ref_chosen_given_rejected", "ref_rejected_given_chosen",
    "ref_chosen_given_chosen", "ref_rejected_given_rejected",
)  # fmt: skip
PAIR_NUMBERS = (
    "response_scores", "response_baselines",
    "log_ratio_chosen", "log_ratio_rejected", "chosen_scores", "rejected_scores", "greedy_scores",
    "chosen_returns", "rejected_returns", "chosen_starts", "chosen_ends", "rejected_starts",
    "rejected_ends", "strengths", "gaps", "sample_advantages",
)  # fmt: skip
PAIR_SHARES = (
    "label", "chosen_win_rates", "rejected_win_rates", "chosen_weights", "rejected_weights",
    "reliability", "uncertainty", "kl_chosen", "kl_rejected", "success_rates",
    "desirable_probability",
)  # fmt: skip
GROUP_NUMBERS = (
    "scores", "current_scores", "initial_scores", "future_scores", "search_q",
    "critic_q", "turn_scores", "log_ratios",
)  # fmt: skip
TOKEN_SUMS = ("token_logprobs", "token_ref_logprobs", "log_sum_sq_probs")
TOKEN_NUMBERS = (
    "token_values",
    "token_returns",
    "token_rewards_chosen",
    "token_rewards_rejected",
    "token_rewards",
)
PAIR_ERRORS = ("chosen_errors", "rejected_errors", "ref_chosen_errors", "ref_rejected_errors")
FIELDS = ("prediction", "reference", "unconditional", "sample", "next_samples", "noisy", "clean",
          "noise")  # fmt: skip
SCENES = (
    "chosen_scene", "rejected_scene", "teacher_chosen", "teacher_rejected", "better_chosen",
    "worse_rejected",
)  # fmt: skip

ARGUMENTS = {
    **dict.fromkeys(PAIR_SUMS, _sums(B)),
    **dict.fromkeys(PAIR_NUMBERS, _normal(B)),
    **dict.fromkeys(PAIR_SHARES, _probabilities(B)),
    **dict.fromkeys(GROUP_NUMBERS, _normal(B, K)),
    **dict.fromkeys(TOKEN_SUMS, _sums(B, T)),
    **dict.fromkeys(TOKEN_NUMBERS, _normal(B, T)),
    **dict.fromkeys(("chosen_counts", "rejected_counts", "prefix_counts"), _counts(B)),
    **dict.fromkeys(("chosen_mask", "rejected_mask", "action_mask", "state_mask"), _mask(B, T)),
    **dict.fromkeys(("chosen_tokens", "rejected_tokens"), _integers(9, B, T)),
    **dict.fromkeys(("chosen_visits", "rejected_visits"), _integers(9, B)),
    **dict.fromkeys(("is_bought", "meets_requirement"), _mask(B)),
    **dict.fromkeys(("chosen_hidden", "rejected_hidden"), _normal(20, H)),
    **dict.fromkeys(("chosen_embeddings", "rejected_embeddings"), _normal(B, H)),
    **dict.fromkeys(("chosen_ensemble", "rejected_ensemble"), _normal(B, 10)),
    **dict.fromkeys(("group_policy", "group_ref"), _sums(B, K)),
    **dict.fromkeys(("paid", "cheapest"), lambda: torch.tensor([900.0, 800.0, 700.0])),
    **dict.fromkeys(("log_p", "log_q"), lambda: _normal(B, 9)().log_softmax(-1)),
    **dict.fromkeys(
        ("desirable", "kept", "response_passed"), lambda: torch.tensor([True, False, True])
    ),
    **dict.fromkeys(("first_logprobs", "second_logprobs"), _sums(B, K, K)),
    **dict.fromkeys(("kl_estimate", "delta"), lambda: torch.zeros(())),
    **dict.fromkeys(("node_q", "node_v"), lambda: torch.tensor([0.1, 0.6, 0.4, 0.9])),
    **dict.fromkeys(("node_visits", "parent_visits"), lambda: torch.tensor([4, 3, 1, 2])),
    **dict.fromkeys(("history_chosen", "history_rejected"), lambda: [_sums(B)(), _sums(B)()]),
    **dict.fromkeys(("chosen_margins", "rejected_margins"), lambda: [_normal(B)()]),
    "objective_weights": lambda: (0.6, 0.4),
    "hidden": _normal(B, T, H),
    "ref_hidden": _normal(B, T, H),
    "weight": _normal(30, H),
    "targets": _integers(30, B, T),
    "group_counts": _counts(B, K),
    "rates": _probabilities(B, K),
    "fits": lambda: torch.tensor([[1.0, 0.0, 1.0]]),
    "two_scores": _normal(B, 2),
    "two_passed": _mask(B, 2),
    "is_student": _mask(B, K),
    "passed": _mask(B, K),
    "kl": _probabilities(B, K),
    "kl_max": lambda: 10.0,
    "rewards": _probabilities(B),
    "reward_table": lambda: 1 + _probabilities(B, 2)(),
    "judgements": _normal(B, K, 3),
    "preferences": _preferences,
    "game_policy": lambda: torch.full((3,), 1 / 3).log(),
    "game_ref": lambda: torch.full((3,), 1 / 3).log(),
    "game_preferences": lambda: _preferences()[0, :3, :3],
    "class_probs": lambda: _normal(10, B, 2)().softmax(-1),
    "batch_beta": lambda: torch.tensor(0.1),
    "phrase_ids": _integers(3, B, T),
    "activations": _normal(B, T, H),
    "singular_values": _probabilities(50),
    "features": _normal(K, H),
    "feature_weights": _normal(H),
    "ranking": lambda: torch.tensor([2, 0]),
    "embeddings": _normal(6, H),
    "is_soft": lambda: torch.tensor([True, True, True, False, False, False]),
    "passes": lambda: _integers(2, B, K, 3)() == 1,
    "step_verdicts": lambda: _integers(2, B, K)() == 1,
    "compare": lambda: lambda first, second: torch.full(first.shape, 0.7),
    "tree": lambda: Tree(
        torch.tensor([-1, 0, 0, 1]), torch.tensor([0.2, 0.7, 0.4, 0.9]), torch.tensor([4, 3, 1, 2])
    ),
    "tree_parent": lambda: torch.tensor([-1, 0, 0, 0]),
    **dict.fromkeys(
        ("row_rewards", "response_rewards", "row_returns", "row_accuracy"), _probabilities(N)
    ),
    "row_groups": lambda: torch.arange(N) // K,
    "row_lengths": lambda: 1 + _integers(9, N)(),
    "row_components": _normal(N, 2),
    "row_correct_share": lambda: (torch.arange(N) % 3 == 0).float(),
    **dict.fromkeys(("row_correct", "row_constructed"), lambda: torch.arange(N) % 2 == 0),
    "tool_calls": _integers(4, N),
    **dict.fromkeys(("row_trajectories", "row_anchors", "steps"), lambda: torch.arange(N) // 2),
    **dict.fromkeys(("token_old_logprobs", "token_weights", "token_entropy"), _probabilities(B, T)),
    "token_old_values": _normal(B, T),
    "sample_groups": lambda: torch.tensor([0, 0, 1]),
    **dict.fromkeys(("clip_bounds", "mean_entropy"), _probabilities(B)),
    "distinctiveness": _probabilities(B),
    "finished": lambda: torch.tensor([True, False, True]),
    "group_old_policy": _sums(B, K),
    "group_desirable": lambda: torch.arange(K).expand(B, K) % 2 == 0,
    "levels": lambda: 1 + _integers(4, B, K)(),
    "optimal_values": _normal(B),
    "num_prompts": lambda: 8,
    "batch_size": lambda: 4,
    "generator": lambda: torch.Generator().manual_seed(0),
    "generate": lambda: list,
    **dict.fromkeys(("model", "tokenizer"), object),
    "output": lambda: "run",
    "prompts": lambda: ["prompt"],
    "score": lambda: len,
    "pairs": lambda: Pairs(torch.arange(B), torch.zeros(B).long(), torch.ones(B).long()),
    # of diffusion: errors of pairs, groups, segments and steps; fields of a denoiser
    **dict.fromkeys((*PAIR_ERRORS, "errors", "ref_errors"), _probabilities(B)),
    **dict.fromkeys((f"{name[:-7]}_segment_errors" for name in PAIR_ERRORS), _probabilities(B, T)),
    **dict.fromkeys((f"{name[:-7]}_pair_errors" for name in PAIR_ERRORS), _probabilities(B, 2)),
    **dict.fromkeys(("chosen_step_errors", "rejected_step_errors"), _probabilities(B, T)),
    **dict.fromkeys(("group_errors", "group_ref_errors"), _probabilities(B, K)),
    **dict.fromkeys(("group_shares", "text_scores", "condition_scores"), _probabilities(B, K)),
    **dict.fromkeys(("draw_errors", "draw_ref_errors"), _probabilities(B, K, 10)),
    "group_reward_scores": _normal(B, K, 5),
    "frame_errors": _probabilities(B, T),
    "segments": lambda: [0, 0, 1, 1, 2],
    "segment_labels": lambda: _integers(3, B, T)() - 1,
    "losses": lambda: list(_probabilities(2)()),
    **dict.fromkeys(("sample_reward", "sample_quality"), _probabilities(B)),
    **dict.fromkeys(("pair_margins", "text_quality"), _probabilities(B)),
    "neighbour_distance": _probabilities(B),
    "set_score": lambda: lambda members: float(members.sum()),
    "reward_axes": _normal(2, B, K),
    "video_axes": _normal(7, B, K),
    **dict.fromkeys(FIELDS, _normal(B, 2, T, 4)),
    **dict.fromkeys(SCENES, _normal(B, 10, 3)),
    "target": lambda: diffusion.targets.epsilon(_normal(B, 2, T, 4)()),
    "flow_target": lambda: diffusion.targets.flow(*(_normal(B, 2, T, 4)() for _ in range(2))),
    "inverted_target": lambda: diffusion.targets.inverted(
        *(_normal(B, 2, T, 4)() for _ in range(2)), _probabilities(B)()
    ),
    "step": lambda: diffusion.ddim_step(0.5, 0.6),
    "alphas_cumprod": _probabilities(T),
    "higher_alphas_cumprod": lambda: _probabilities(T)() + 0.05,
    "sample_alphas_cumprod": _probabilities(B),
    "lower_alphas_cumprod": lambda: _probabilities(B)() / 2,
    "high_sigmas": lambda: torch.tensor([0.9, 0.6]),
    "low_sigmas": lambda: torch.tensor([0.6, 0.3]),
    "uniforms": _probabilities(B),
    "normals": _normal(B),
    "group_advantage": _normal(B, K),
    "guidance_scale": lambda: 5.0,
    **dict.fromkeys(
        ("base_weights", "positive_weights", "weight_deltas"), lambda: {"weight": _normal(H)()}
    ),
    "errors_of": lambda: lambda row: row.square().mean(-1),
    "micro_batches": lambda: list(torch.ones(2, 1, 4, requires_grad=True).unbind()),
    "loss_of": lambda: torch.sum,
}

# The example of a parameter, where it has another name, and of the parameters of one call.
KINDS = {
    "accuracy": "row_accuracy",
    "advantages": "sample_advantages",
    "alphas_cumprod_prev": "higher_alphas_cumprod",
    "anchors": "row_anchors",
    "base": "base_weights",
    "baseline_scores": "scores",
    "chosen": "chosen_scene",
    "chosen_rewards": "token_rewards_chosen",
    "clip_high": "clip_bounds",
    "clip_low": "clip_bounds",
    "conditional": "prediction",
    "constructed": "row_constructed",
    "correct": "row_correct",
    "counts": "group_counts",
    "critic": "critic_q",
    "current": "current_scores",
    "distances": "neighbour_distance",
    "entropy": "token_entropy",
    "extra_counts": "chosen_counts",
    "first": "chosen_embeddings",
    "future": "future_scores",
    "greedy_rewards": "greedy_scores",
    "groups": "row_groups",
    "has_eos": "passed",
    "ids": "chosen_tokens",
    "initial": "initial_scores",
    "is_right": "step_verdicts",
    "labels": "segment_labels",
    "lengths": "row_lengths",
    "log_ratio": "log_ratio_chosen",
    "logprobs": "token_logprobs",
    "margins": "pair_margins",
    "mask": "chosen_mask",
    "metric": "row_correct_share",
    "next_alphas_cumprod": "lower_alphas_cumprod",
    "normal": "normals",
    "old_logprobs": "token_old_logprobs",
    "old_values": "token_old_values",
    "parent": "tree_parent",
    "pass_rates": "success_rates",
    "penalties": "token_weights",
    "policy": "group_policy",
    "policy_mask": "chosen_mask",
    "positive": "positive_weights",
    "probs": "class_probs",
    "q": "node_q",
    "quality": "sample_quality",
    "ref": "group_ref",
    "ref_errors": "group_ref_errors",
    "ref_logprobs": "token_ref_logprobs",
    "rejected": "rejected_scene",
    "rejected_rewards": "token_rewards_rejected",
    "returns": "token_returns",
    "reward": "sample_reward",
    "reward_ref_errors": "draw_ref_errors",
    "rewards": "row_rewards",
    "sampler_logprobs": "token_ref_logprobs",
    "samples": "micro_batches",
    "scale": "guidance_scale",
    "search": "search_q",
    "second": "rejected_embeddings",
    "shares": "group_shares",
    "sigma": "high_sigmas",
    "sigma_next": "low_sigmas",
    "sigmas": "high_sigmas",
    "step_returns": "row_returns",
    "tokens": "chosen_tokens",
    "trajectories": "row_trajectories",
    "uniform": "uniforms",
    "v": "node_v",
    "values": "token_values",
    "visits": "node_visits",
    "weights": "feature_weights",
    "win_rates": "chosen_win_rates",
}
KINDS_OF_CALLS = {
    "advantages.bnpo": {"rewards": "row_correct_share"},
    "advantages.gae": {"rewards": "token_rewards_chosen"},
    "advantages.gdpo": {"rewards": "row_components"},
    "advantages.mo_grpo": {"rewards": "row_components"},
    "advantages.weighted_sum_grpo": {"rewards": "row_components"},
    "advantages.otb": {"rewards": "token_rewards_chosen", "groups": "sample_groups"},
    "advantages.passk_analytic": {"rewards": "row_correct_share"},
    "advantages.reinforce_pp": {"rewards": "token_rewards_chosen"},
    "advantages.remax": {"rewards": "token_rewards_chosen"},
    "advantages.remax_returns": {
        "rewards": "chosen_scores",
        "policy": "token_logprobs",
        "ref": "token_ref_logprobs",
    },
    "advantages.rloo": {"rewards": "scores"},
    "advantages.truncated_gae": {"rewards": "token_rewards_chosen"},
    "data.objectives.dominance_pairs": {"rewards": "reward_axes"},
    "data.objectives.prompt_a_video_pairs": {"rewards": "video_axes"},
    "data.pairs.first_unless_worse": {"scores": "two_scores"},
    "data.pairs.self_preference_pairs": {"strengths": "preferences"},
    "data.scores.penalize_missing_eos": {"scores": "two_scores", "has_eos": "two_passed"},
    "data.selection.pairs_from_rewrites": {"scores": "turn_scores"},
    "data.visual_rules.flow_dpo_pairs": {"rewards": "scores"},
    "data.visual_rules.dragon_pairs": {"score": "set_score"},
    "diffusion.data.sail.self_rewards": {"errors": "draw_errors"},
    "diffusion.data.segments.segment_means": {"errors": "frame_errors"},
    "diffusion.guidance.negative_weights": {"delta": "weight_deltas"},
    "diffusion.losses.bide_dpo": {
        "chosen_errors": "chosen_pair_errors",
        "rejected_errors": "rejected_pair_errors",
        "ref_chosen_errors": "ref_chosen_pair_errors",
        "ref_rejected_errors": "ref_rejected_pair_errors",
    },
    "diffusion.losses.dense_dpo": {
        "chosen_errors": "chosen_segment_errors",
        "rejected_errors": "rejected_segment_errors",
        "ref_chosen_errors": "ref_chosen_segment_errors",
        "ref_rejected_errors": "ref_rejected_segment_errors",
    },
    "diffusion.losses.dgpo": {"errors": "group_errors", "advantages": "group_advantage"},
    "diffusion.losses.gdro": {"errors": "group_errors"},
    "diffusion.losses.inversion_dpo": {
        "chosen_errors": "chosen_step_errors",
        "rejected_errors": "rejected_step_errors",
    },
    "diffusion.losses.kto": {"ref_errors": "ref_errors"},
    "diffusion.losses.preference_shares": {"scores": "group_reward_scores"},
    "diffusion.losses.rank_dpo": {"errors": "group_errors"},
    "diffusion.losses.renoise": {"alphas_cumprod": "sample_alphas_cumprod"},
    "diffusion.losses.self_npo": {"alphas_cumprod": "sample_alphas_cumprod"},
    "losses.a2po": {
        "policy": "policy_chosen",
        "ref": "ref_chosen",
        "scores": "rewards",
        "values": "optimal_values",
    },
    "losses.apo_zero_unpaired": {"policy": "policy_chosen", "ref": "ref_chosen"},
    "losses.bco": {"policy": "policy_chosen", "ref": "ref_chosen"},
    "losses.c_morl_barrier": {"policy": "policy_chosen", "returns": "reward_table"},
    "losses.crpg": {
        "policy": "policy_chosen",
        "ref": "ref_chosen",
        "counts": "chosen_counts",
        "scores": "chosen_scores",
        "baseline_scores": "greedy_scores",
        "passed": "kept",
    },
    "losses.crraft": {"policy": "policy_chosen", "weights": "chosen_weights"},
    "losses.disco": {"desirable": "group_desirable"},
    "losses.discob": {"desirable": "group_desirable"},
    "losses.dual_gap": {
        "policy": "game_policy",
        "ref": "game_ref",
        "preferences": "game_preferences",
    },
    "losses.gepo": {"desirable": "group_desirable"},
    "losses.kimi_mdpo": {"old_policy": "group_old_policy"},
    "losses.kto": {"policy": "policy_chosen", "ref": "ref_chosen", "kl": "kl_estimate"},
    "losses.modpo": {"weights": "objective_weights"},
    "losses.nash_md": {"policy": "token_logprobs", "ref": "token_ref_logprobs"},
    "losses.oreo": {"policy": "token_logprobs", "ref": "token_ref_logprobs", "rewards": "rewards"},
    "losses.raft": {"policy": "policy_chosen", "counts": "chosen_counts"},
    "losses.reg_grpo": {"old_policy": "group_old_policy"},
    "losses.remax": {"policy": "token_logprobs"},
    "losses.rloo": {"policy": "policy_chosen"},
    "metrics.linear_separability": {"chosen": "chosen_hidden", "rejected": "rejected_hidden"},
    "metrics.ranking_accuracy": {"chosen": "policy_chosen", "rejected": "policy_rejected"},
    "sequence_sums": {"values": "token_logprobs"},
    "surrogates.gtpo_weights": {"groups": "sample_groups", "entropy": "mean_entropy"},
    "surrogates.policy_loss": {"weights": "token_weights"},
}


def kind(call: str, parameter: str, name: str) -> str:
    """The example for what a call of that name, below ``fastpo``, gives to a parameter."""
    if name != parameter and name in ARGUMENTS:
        return name
    return KINDS_OF_CALLS.get(call, {}).get(parameter) or KINDS.get(parameter, parameter)
