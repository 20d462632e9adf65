"""Short runs must learn what the docstrings promise; benchmark/README.md has what several seeds gave."""

import json

import pytest

import coded_maddpg
import lemol
import maml_rl
import meta_mapg
import mg2l
import tesp

pytestmark = pytest.mark.slow


def final(module, tmp_path, **kw):
    """The last evaluation of a run with the preset of its env and some other arguments."""
    module.train(module.Args(**module.preset(module.Args(**kw)) | kw, run_dir=str(tmp_path)))
    return json.loads((tmp_path / "eval.json").read_text())


def test_meta_mapg_makes_both_kinds_of_peers_cooperate(tmp_path):
    result = final(meta_mapg, tmp_path, env="ipd")
    assert result["eval/cooperative/sum_after_phi_0"] > 4
    assert result["eval/defective/sum_after_phi_0"] > 3
    assert result["eval/defective/peer_return_7"] < -0.7 < result["eval/defective/return_7"]


def test_without_peer_learning_it_ends_in_mutual_defection(tmp_path):
    result = final(meta_mapg, tmp_path, env="ipd", method="meta-pg", total_steps=2_160_000)
    assert result["eval/cooperative/sum_after_phi_0"] < 1.5
    assert result["eval/defective/sum_after_phi_0"] < -2


def test_sampled_gradient_of_rps_leads_the_peer_on(tmp_path):
    result = final(meta_mapg, tmp_path, env="rps", num_chains=12, outer_lr=0.04, total_steps=12_288_000,
                   eval_every=0)
    assert result["eval/return_0"] < -0.02  # loses first, to win later; untrained: 0.00 and a sum of 0.92
    assert result["eval/sum_after_phi_0"] > 1.15  # measured: -0.08 and 1.34


def test_tesp_finds_hidden_goals_in_three_fast_updates(tmp_path):
    result = final(tesp, tmp_path, env="nav2d")
    warmup, *updates = (result[f"eval/test/return_{k}"] for k in ("warmup", 0, 1, 2, 3))
    assert updates[3] > -9 and updates[3] > 0.6 * warmup  # measured: -18 and then -6
    assert updates[0] < updates[1] < updates[2] < updates[3]  # each update helps


def test_coded_maddpg_spreads_out(tmp_path):
    result = final(coded_maddpg, tmp_path, env="simple_spread", total_steps=100_000)
    assert result["eval/return"] > result["eval/random/return"] + 10  # -59 against -75; -43 after 500,000
    assert result["eval/landmark_distance"] < 0.55 < result["eval/random/landmark_distance"]


def test_lemol_foresees_a_new_learner_better_than_a_model_without_learning_state(tmp_path):
    result = final(lemol, tmp_path, env="simple_push", num_episodes=628, n_opp_cycles=2, om_training_iters=10,
                   total_steps=251_200)
    assert result["eval/cycle_1/om_ce"] > 1.55  # untrained: ln 5 = 1.61
    assert result["eval/cycle_2/om_ce"] < 1.46
    assert result["eval/cycle_2/om_ce"] < result["eval/cycle_2/ablated_ce"] - 0.04
    assert result["eval/cycle_2/om_acc"] > result["eval/cycle_2/ablated_acc"] + 0.05
    assert result["eval/return_1"] > -18  # the attacker learns: -26 by chance


def test_mg2l_tells_hidden_targets_from_what_one_agent_saw(tmp_path):
    result = final(mg2l, tmp_path, env="spread", total_steps=1_216_000, eval_every=0)  # of the warm-up alone
    assert result["eval/test/accuracy_zi_8"] > 0.7  # measured: 0.88; chance 0.33
    assert result["eval/test/accuracy_z_8"] > 0.75  # 0.92


def test_maml_finds_a_goal_in_one_step(tmp_path):
    result = final(maml_rl, tmp_path, env="nav2d", total_steps=1_600_000)  # 20 iterations
    before, after = result["eval/return_0"], result["eval/return_1"]
    assert after > -22 and after > before + 10  # measured: -39 and -14 after 36 iterations
    assert result["eval/random/return_1"] < -50
