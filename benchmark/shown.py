"""
What benchmark/plot.py shows of results/: the rows of each script's table, the lines of each figure, and the
papers' numbers beside them.

A table is (columns {head: tag}, digits, rows); a row (setting, method, result, prefix of its tags or, with
{}, what is around them, the paper's numbers as text). A figure is a list of panels (title, x label, y label,
lines, papers), as plot.figure() says.
"""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"

# ---------------------------------------------------------------- Meta-MAPG
# Kim et al. 2021, read off the vector figure: reward per step of agent i after 0 .. 7 updates; in the
# cheetah, return after 0 .. 2. The paper's agents are LSTMs.
MAPG = {
    ("ipd", "cooperative"): {
        "Meta-MAPG": (0.406, 1.498, 1.496, 1.472, 1.463, 1.432, 1.396, 1.353),
        "Meta-PG": (0.466, 0.262, -0.270, -0.392, -0.431, -0.452, -0.465, -0.477),
        "LOLA-DiCE": (0.925, 0.218, -0.138, -0.253, -0.304, -0.348, -0.383, -0.392),
        "REINFORCE": (0.968, -0.028, -0.319, -0.397, -0.441, -0.465, -0.474, -0.479)},
    ("ipd", "defective"): {
        "Meta-MAPG": (-0.513, 1.314, 1.233, 1.139, 1.053, 0.997, 0.928, 0.915),
        "Meta-PG": (-0.515, -0.457, -0.484, -0.488, -0.491, -0.493, -0.494, -0.494),
        "LOLA-DiCE": (-0.047, -0.428, -0.439, -0.440, -0.441, -0.442, -0.443, -0.443),
        "REINFORCE": (-0.027, -0.494, -0.495, -0.496, -0.497, -0.497, -0.497, -0.498)},
    ("rps", "all"): {
        "Meta-MAPG": (-0.027, 0.388, 0.543, 0.627, 0.673, 0.698, 0.707, 0.642),
        "Meta-PG": (0.188, 0.364, 0.235, 0.182, 0.145, 0.092, 0.046, -0.002)},
    ("half_cheetah_dir", "left"): {
        "Meta-MAPG": (200.4, 203.9, 206.9), "Meta-PG": (201.8, 205.7, 208.0),
        "LOLA-DiCE": (70.9, 72.9, 75.2), "REINFORCE": (113.6, 112.2, 112.8)}}
GAMES = {"Meta-MAPG": "", "Meta-PG": "-method-meta-pg", "LOLA-DiCE": "-method-lola-dice",
         "REINFORCE": "-method-reinforce"}
LSTM = {"ipd": "meta_mapg-ipd-policy-lstm-outer-lr-0.0003-critic-lr-0.0005",
        "rps": "meta_mapg-rps-policy-lstm-outer-lr-0.0001-critic-lr-0.0005"}
PHI = [f"return_{k}" for k in range(8)]


def paper_sum(game, peers, method):
    return f"{sum(MAPG[game, peers][method][1:]):+.2f}"


mapg_rows = []
for peers in ("cooperative", "defective"):
    for method, name in GAMES.items():
        mapg_rows.append((f"IPD, {peers} peers", f"{method}, exact table", f"meta_mapg-ipd{name}",
                          f"eval/{peers}/", paper_sum("ipd", peers, method)))
    for label, name in ("DiCE", LSTM["ipd"]), ("Loaded DiCE", "meta_mapg-ipd-policy-lstm-60m"):
        mapg_rows.append((f"IPD, {peers} peers", f"Meta-MAPG, LSTM, {label}", name, f"eval/{peers}/",
                          paper_sum("ipd", peers, "Meta-MAPG")))
for method in ("Meta-MAPG", "Meta-PG"):
    mapg_rows.append(("RPS", f"{method}, sampled table", f"meta_mapg-rps{GAMES[method]}", "eval/",
                      paper_sum("rps", "all", method)))
mapg_rows.append(("RPS", "Meta-MAPG, LSTM", LSTM["rps"], "eval/", paper_sum("rps", "all", "Meta-MAPG")))
for method, name in GAMES.items():
    mapg_rows.append(("two-agent cheetah", f"{method}, LSTM", f"meta_mapg-half_cheetah_dir{name}",
                      "eval/left/", paper_sum("half_cheetah_dir", "left", method)))


def chain(game, peers, prefix, lines):
    """A panel: reward per step of agent i after each update."""
    papers = {label: MAPG[game, peers]["Meta-MAPG"] for label in list(lines)[:1]}
    shown = [(name, [prefix + tag for tag in PHI], label) for label, name in lines.items()]
    return (f"{game.upper()}, {peers} peers", "updates", "reward per step", shown, papers)


exact = {method: f"meta_mapg-ipd{name}" for method, name in GAMES.items()}

# ---------------------------------------------------------------- MAML-RL
# Finn et al. 2017, the result files published with the code: 40 tasks, after 0 .. 3 inner steps. Their
# cheetah takes steps of 0.01 s with full torque, ours of 0.05 s with a tenth: compare shapes, not numbers.
NAV = {"MAML": "", "FOMAML": "-first-order", "E-MAML": "-e-maml", "Meta-SGD": "-method-meta-sgd",
       "MAESN": "-method-maesn", "ProMP": "-outer-promp-total-steps-8000000",
       "pretrained": "-method-pretrained"}
AUTHORS = "maml_rl-nav2d-action-scale-0.1-inner-lr-0.5-hidden-100-activation-relu"
BEFORE_RELU = "E-MAML", "ProMP", "pretrained"  # not run anew since the default has changed
maml_rows = [("nav2d" + ", recipe before" * (method in BEFORE_RELU), method, f"maml_rl-nav2d{name}",
              "eval/", "") for method, name in NAV.items()]
maml_rows += [
    ("nav2d, the authors' actions, recipe before", "MAML", AUTHORS, "eval/", "-40 / -12 / -3 / -3"),
    ("half_cheetah_dir", "MAML", "maml_rl-half_cheetah_dir", "eval/", "-51 / 293 / 314 / 316"),
    ("half_cheetah_vel", "MAML", "maml_rl-half_cheetah_vel", "eval/", "-130 / -79 / -67 / -61")]
STEPS = {f"{k} step{'s' * (k != 1)}": f"return_{k}" for k in range(4)}

# ---------------------------------------------------------------- TESP
# The supplement's figure of the ant, read off, at 100 iterations: D', after three updates.
VARIANTS = {"TESP": "", "buffer last": "-buffer-last", "buffer all": "-buffer-all",
            "frozen step sizes": "-no-learn-alpha"}
tesp_rows = [("wheeled, 8 M steps", method, f"tesp-wheeled{name}", "eval/", "")
             for method, name in VARIANTS.items()]
METHODS = {"TESP": "", "Meta-SGD": "-meta-sgd", "MAESN": "-maesn", "MAML, first order": "-maml"}
tesp_rows += [("wheeled, 5 M steps", method, f"tesp-wheeled-5m{name}", "eval/", "")
              for method, name in METHODS.items()]
tesp_rows += [("wheeled, the paper's size, 50 iterations", "TESP", "tesp-wheeled-paper", "eval/", ""),
              ("small_ant, 19 iterations", "TESP", "tesp-small_ant", "eval/", "-31 at 100 iterations")]
UPDATES = {"warm-up": "test/return_warmup"} | {
    f"{k} update{'s' * (k != 1)}": f"test/return_{k}" for k in range(4)}

# ---------------------------------------------------------------- Coded MADDPG
# The authors' own program with learners and no code: means of 1,000 training episodes of simple_spread under
# the rules of 2017, after the exploration. They stand, unrounded, in github.com/BaoqianWang/
# coding_distributed_marl, commit 6206ad3, learning_curves/simple_spreaduncoded_rewards_<M>_agents.pkl.
CODED = {3: (-736, -603, -580, -556, -536, -530, -519, -513, -504, -508, -494, -488, -485, -486, -480),
         8: (-8899, -7582, -6788, -6703, -6851, -6840, -6865, -6778)}
coded_rows = [("spread, M = 3", "MADDPG", "coded_maddpg-simple_spread", "eval/", ""),
              ("spread, M = 3", "MADDPG, B = 1024", "coded_maddpg-simple_spread-500k", "eval/", ""),
              ("spread, M = 3", "MADDPG, B = 1024, 64 envs", "coded_maddpg-simple_spread-num-envs-64",
               "eval/", ""),
              ("spread, M = 8", "MADDPG",
               "coded_maddpg-simple_spread-total-steps-400000-num-agents-8", "eval/", "")]
if (RESULTS / "coded_maddpg-beside-port.csv").exists():  # benchmark/beside_port.py
    coded_rows += [("spread, M = 3, in mpe2, greedy", method, "coded_maddpg-beside-port", f"{who}/", "")
                   for method, who in [("MADDPG, B = 1024", "ours"), ("maddpg-pettingzoo-pytorch", "port")]]
# A sum over opponents measures nothing: one of each side, against the learned other side. The random policy
# meets a random other side.
for env, M, steps in [("adversary", 3, 500_000), ("push", 3, 500_000), ("tag", 3, 500_000),
                      ("push", 8, 400_000), ("tag", 8, 400_000)]:
    for side, i in ("an adversary", 0), ("a good agent", M - 1):
        coded_rows.append((f"{env}, M = {M}", f"MADDPG, {side}",
                           f"coded_maddpg-simple_{env}-total-steps-{steps}-num-agents-{M}",
                           f"eval/{{}}/agent_{i}", ""))
coded_rows.append(
    ("spread, M = 3, 15 learners, 4 stragglers", "sparse MDS code",
     "coded_maddpg-simple_spread-total-steps-200000-num-learners-15-engine-inline-num-stragglers-4",
     "eval/", ""))

# ---------------------------------------------------------------- LeMOL
RESULTS = Path(__file__).parent / "results"
LEMOL = {"LeMOL": "", "ablated": "-om-ablated"}
lemol_rows = [("simple_push", method, f"lemol-simple_push{name}", "eval/", "")
              for method, name in LEMOL.items()]

EQUAL = {"maddpg": "MADDPG with memory", "uninformed": "uninformed", "ablated": "ablated",
         "ep": "LeMOL", "oracle": "oracle of the action", "policy": "oracle of the policy",
         "hidden": "oracle of what is hidden"}
equal_rows = [(env, label, f"lemol-{env}-equal-{kind}", "eval/", "")
              for env in ("uav", "simple_push") for kind, label in EQUAL.items()
              if (RESULTS / f"lemol-{env}-equal-{kind}.csv").exists()]
MET = [f"eval/{tag}" for tag in ("return", "anew", "frozen")]

# ---------------------------------------------------------------- MG2L
# A row of the present recipe replaces that of the recipe before, "mg2l-before-...", once its result is there.
MG2L = {"task given": "-method-task-given", "joint": "", "own": "-local-loss-own",
        "global only": "-method-global-only", "MA-PEARL": "-method-pearl", "none": "-method-none"}
mg2l_rows = [(world, method, f"mg2l-{world}{name}", "eval/test/", "")
             for world in ("spread", "hunting", "cheetah_dir", "hopper_param", "rware")
             for method, name in MG2L.items() if (RESULTS / f"mg2l-{world}{name}.csv").exists()]
BEFORE = {"task given": "-task-given", "own": "", "joint": "-joint", "global only": "-global-only",
          "MA-PEARL": "-pearl", "none": "-none"}
mg2l_rows += [(f"{world}, recipe before", method, f"mg2l-before-{world}{name}", "eval/train/", "")
              for world in ("spread", "hunting") for method, name in BEFORE.items()
              if not (RESULTS / f"mg2l-{world}{MG2L[method]}.csv").exists()]
mg2l_rows += [("cheetah_dir, recipe before", "joint", "mg2l-before-cheetah_dir", "eval/train/", ""),
              ("hopper_param, recipe before", "joint", "mg2l-before-hopper_param", "eval/test/", ""),
              ("rware, recipe before", "joint", "mg2l-before-rware", "eval/train/", "")]

TABLES = {
    "meta_mapg": ({"φ_0": "return_0", "φ_1": "return_1", "φ_2": "return_2", "φ_7": "return_7",
                   "sum from φ_1": "sum_after_phi_0"}, 2, mapg_rows),
    "maml_rl": (STEPS, 1, maml_rows),
    "tesp": (UPDATES | {"D, last": "train/return_3", "D'', last": "test2/return_3"}, 1, tesp_rows),
    "coded_maddpg": ({"return": "return", "random policy": "random/return"}, 1, coded_rows),
    "lemol": ({"return": "return_0", "opponent's": "return_1", "cross-entropy": "cycle_3/om_ce",
               "ablated": "cycle_3/ablated_ce"}, 2, lemol_rows),
    "lemol_equal": ({"both learn": "return", "last policies": "last", "met again, learns": "anew",
                     "met again, frozen": "frozen", "cross-entropy": "om_ce"}, 2, equal_rows),
    "mg2l": ({"prior": "return_0", "after 8 episodes": "return_8", "z^i tells the task": "accuracy_zi_8"}, 2,
             mg2l_rows)}

FIGURES = {
    "meta_mapg-ipd": [chain("ipd", peers, f"eval/{peers}/", exact) for peers in ("cooperative", "defective")],
    "maml_rl-nav2d": [
        ("2-D navigation, training", "million steps", "return after one step",
         [(f"maml_rl-nav2d{name}", "adapt/return_1", method) for method, name in NAV.items()
          if method not in BEFORE_RELU], {}),
        ("held-out goals", "inner steps", "return",
         [(f"maml_rl-nav2d{name}", [f"eval/return_{k}" for k in range(4)], method)
          for method, name in NAV.items() if method not in BEFORE_RELU], {})],
    "tesp-wheeled": [
        ("wheeled, 5 M steps, training", "million steps", "return of the adapted policy",
         [(f"tesp-wheeled-5m{name}", "charts/episodic_return", method)
          for method, name in METHODS.items()], {}),
        ("held-out goals", "batches of 20 episodes seen", "return",
         [(f"tesp-wheeled-5m{name}", [f"eval/{tag}" for tag in [*UPDATES.values()][bool(name):]], method)
          for method, name in METHODS.items()], {}),
        ("small_ant, training", "million steps", "return of the adapted policy",
         [("tesp-small_ant", "charts/episodic_return", "TESP")], {"TESP": {50: -31}})],
    "coded_maddpg-spread": [
        ("simple_spread, M = 3", "million steps", "return, all agents",
         [("coded_maddpg-simple_spread", "eval/return", "MADDPG")], {}),
        *[(f"M = {M}, rules of 2017", "million steps", "return, all agents",
           [(f"coded_maddpg-authors-{M}", "eval/return", "MADDPG"),
            (f"coded_maddpg-authors-{M}", "eval/random/return", "random policy")],
           {"MADDPG": {0.0256 + 0.025 * (k + 0.5): number for k, number in enumerate(CODED[M])}})
          for M in CODED]],
    "lemol-simple_push": [
        ("cross-entropy of the opponent model", "earlier cycles", "nats",
         [("lemol-simple_push", [f"eval/cycle_{c}/om_ce" for c in range(1, 4)], "LeMOL"),
          ("lemol-simple_push", [f"eval/cycle_{c}/ablated_ce" for c in range(1, 4)], "ablated")], {})],
    "lemol-equal": [
        (f"{env}, equal memory, 24 runs", "both learn, met again, met again frozen", "return",
         [(row[2], MET, row[1]) for row in equal_rows if row[0] == env], {})
        for env in ("uav", "simple_push")],
    "mg2l": [
        (world, "million steps", "return in training, latents inferred",
         [(row[2], "charts/episodic_return", row[1]) for row in mg2l_rows if row[0] == world]
         or [(f"mg2l-before-{world}{name}", "adapt/return_1", f"{method}, recipe before")
             for method, name in BEFORE.items() if method not in ("none", "task given")], {})
        for world in ("spread", "hunting")]}
