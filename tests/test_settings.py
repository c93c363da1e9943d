"""One class of settings for all notebooks: profiles, overrides, ranges, and which notebook has which as a parameter."""

import ast
import json
from dataclasses import asdict, fields, replace

import pytest

from flowerlib.lab import reproduce, runs, store
from flowerlib.lab.settings import FIT, FIT_LOSSES, FIT_PATHS, PREFERENCE_LOSSES, PROFILES, Settings, literal, settings
from flowerlib.losses import FLOW_LOSSES

NUMBERED = (*reproduce.NOTEBOOKS, reproduce.FIT, reproduce.COMPARISON)  # those that read Settings


def test_settings_take_overrides_and_refuse_nonsense():
    assert settings("smoke", epochs=2, alpha=None).epochs == 2.0
    assert type(settings("smoke", epochs=2).epochs) is float  # as it is kept: 2 and 2.0 are one setting
    with pytest.raises(ValueError, match="unknown profile 'x': choose one of smoke, laptop, study, paper"):
        settings("x")
    for name in ("epoch", "method", "replace", "__class__"):  # attributes are no settings
        with pytest.raises(ValueError, match=f"unknown setting '{name}': the settings are seed, .*epochs"):
            settings("smoke", **{name: 1.0})
    for name, value, kind in (("n_beams", "ten", "int"), ("n_beams", 2.5, "int"), ("n_seeds", "two", "int"),
                              ("one_target", 1, "bool"), ("epochs", True, "float"), ("rows", 3, "str"),
                              ("methods", "sft", "list"), ("guides", 0.5, "list"), ("sweep", {"a": 1}, "list")):
        with pytest.raises(ValueError, match=f"setting {name} takes a {kind}, not "):
            settings("smoke", **{name: value})


def test_every_profile_is_named_by_itself_and_has_values_for_notebook_05():
    assert list(PROFILES) == ["smoke", "laptop", "study", "paper"] and FIT.keys() == PROFILES.keys()
    for name in PROFILES:
        assert settings(name) == PROFILES[name] and settings(name).profile == name
        fit = settings(name, fit=True)
        assert fit == replace(PROFILES[name], **FIT[name]) != PROFILES[name]
        assert settings(name, fit=True, learning_rate=0.5).learning_rate == 0.5
        assert fit.tuned_layers == 0 and not fit.cut_vocabulary  # the model is not cut there
    assert settings("smoke", fit=True).methods == FIT_LOSSES + PREFERENCE_LOSSES
    assert settings("smoke", fit=True).fit_paths == FIT_PATHS


def test_a_name_of_a_loss_is_one_of_the_library():
    own = {"exact_ce", "exact_squared", "subtree_ce", "sft"}
    assert set(FIT_LOSSES) == own | set(FLOW_LOSSES)
    assert not set(FIT_LOSSES) & set(PREFERENCE_LOSSES) and set(runs.METHOD_NAMES) >= {*FIT_LOSSES, *PREFERENCE_LOSSES}


def test_lists_are_lists_in_parameters_in_json_and_in_the_shell():
    own = settings("smoke", sweep=[[-1, 0.5], [0, 0]], guides=[0.1, 1], methods=["exact_ce", "sft"],
                   fit_paths=["policy"], flower_sweep=[["add", 0]])
    assert own.sweep == ((-1, 0.5), (0, 0)) and own.guides == (0.1, 1) and own.fit_paths == ("policy",)
    assert own.methods == ("exact_ce", "sft") and own.flower_sweep == (("add", 0),)
    assert Settings(**json.loads(json.dumps(asdict(own)))) == own and hash(own)
    assert literal("sweep=[[-1, 0.5]]") == ("sweep", [[-1, 0.5]])
    assert literal("methods=['sft']") == ("methods", ["sft"]) and literal("seed=3") == ("seed", 3)
    assert literal("model=a/b=c") == ("model", "a/b=c") and literal("one_target=False") == ("one_target", False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"paths": "loged"}, "paths is 'loged': choose one of logged, reward, policy"),
        ({"rows": "row"}, "choose one of sequence, target"),
        ({"split": "random"}, "choose one of leave-one-out, time"),
        ({"flow": "children"}, "flow is 'children': choose one of subtb, divergence"),
        ({"reward": "mul"}, "reward is 'mul': choose one of none, exact, div, add"),
        ({"reward": "div"}, "set flow to subtb"),
        ({"theta": 9.5}, "theta is 9.5: it must lie between 0 and 1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf: it must lie between -100 and 100"),
        ({"target_alpha": float("-inf")}, "target_alpha is -inf: it must lie between -100 and 100"),
        ({"epochs": 0.0}, "epochs is 0.0"),
        ({"batch_size": 0}, "batch_size is 0: it must lie between 1"),
        ({"test_rows": -5}, "test_rows is -5"),
        ({"max_history": 0}, "max_history is 0"),
        ({"n_beams": 0}, "n_beams is 0"),
        ({"budget": 0}, "budget is 0"),
        ({"n_seeds": 0}, "n_seeds is 0: it must lie between 1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"kl_weight": 0.0}, "kl_weight is 0.0"),
        ({"preference_size": 0}, "preference_size is 0"),
        ({"large_method": "dpo"}, "large_method is 'dpo': choose one of exact_ce"),
        ({"frozen_layers": 0}, "would throw the lower layers away: set both or neither"),
        ({"sweep": []}, r"write \[\[alpha, theta\], …\]"),
        ({"sweep": [[-1]]}, r"write \[\[alpha, theta\], …\]"),
        ({"sweep": [0, 0.5]}, r"write \[\[alpha, theta\], …\]"),
        ({"sweep": [["a", "b"]]}, r"write \[\[alpha, theta\], …\]"),
        ({"sweep": [[0, 0.5], [0, 1]]}, "theta from 0 to below 1"),
        ({"guides": []}, "name one number from 0 to 1"),
        ({"alphas": []}, "name one number from -100 to 100"),
        ({"alphas": [0, float("nan")]}, "name one number from -100 to 100"),
        ({"guides": ["much"]}, "name one number from 0 to 1"),
        ({"guides": [0.5, 2]}, "name one number from 0 to 1"),
        ({"flower_sweep": []}, r"write \[\[reward, theta\], …\], reward none, div or add"),
        ({"flower_sweep": [["mul", 0.9]]}, "reward none, div or add"),
        ({"flower_sweep": [["exact", 0.9]]}, "reward none, div or add"),  # Flower-KL's
        ({"flower_sweep": [["div", 1]]}, "theta from 0 to below 1"),
        ({"methods": ["sft", "ppo"]}, "methods has 'ppo': choose of exact_ce, .*rloo"),
        ({"fit_paths": ["logged"]}, "fit_paths has 'logged': choose of reward, policy, schedule"),
    ],
)
def test_values_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        settings("laptop", **setting)


def test_what_lies_at_the_edge_is_allowed():
    assert settings("laptop", frozen_layers=0, tuned_layers=0).alpha == settings("laptop", theta=1).alpha
    assert settings("laptop", theta=0.0, n_beams=1, guides=[0, 1], sweep=[[0, 0], [0, 0.99]]).theta == 0


def test_one_training_has_one_of_three_names():
    assert settings("laptop").method == "Flower-KL" and settings("paper").method == "Flower"
    assert settings("laptop", theta=1).method == settings("paper", theta=1).method == "SFT"
    for reward in ("none", "div", "add"):
        assert settings("laptop", flow="subtb", reward=reward).method == "Flower"
    assert settings("laptop", flow="subtb").method == "Flower, reward exact"  # the paper has no such reward
    assert settings("laptop", reward="none").method == "Flower-KL, reward none"
    for flow, reward in (("subtb", "exact"), ("divergence", "none")):
        assert settings("laptop", flow=flow, reward=reward).method in runs.METHODS


def test_settings_of_the_step_before_carry_over(tmp_path):
    runs.finish(tmp_path, "data", settings("smoke", category="book", guides=[0.25]))
    step = tmp_path / "data"
    assert settings("smoke", after=step, alpha=0.5) == settings("smoke", category="book", guides=[0.25], alpha=0.5)
    with pytest.raises(ValueError, match="made with PROFILE 'smoke', not 'laptop': give another OUT"):
        settings("laptop", after=step)
    for damaged in ({"settings": {"depth": 3}}, {"depth": 3}, {"settings": None}):
        store.write_json(step / "settings.json", damaged)
        with pytest.raises(ValueError, match="start at notebook 01"):
            settings("smoke", after=step)
    (step / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json is damaged"):
        settings("smoke", after=step)


# The notebooks' parameters


def declared(notebook):
    """Name → (type, default) of a notebook's parameters."""
    cells = json.loads((reproduce.FOLDER / notebook).read_text(encoding="utf-8"))["cells"]
    source = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    return {node.target.id: (node.annotation.id, ast.literal_eval(node.value)) for node in ast.parse(source).body}


def test_every_setting_is_a_parameter_of_a_notebook():
    names = {name for notebook in NUMBERED for name in reproduce.parameters(reproduce.FOLDER / notebook)}
    assert names == {field.name for field in fields(Settings)} - {"profile"} | {"PROFILE", "OUT"}


def test_a_parameter_has_the_type_of_its_setting_and_leaves_the_value_to_the_profile():
    for notebook in NUMBERED:
        for name, (kind, default) in declared(notebook).items():
            if name not in ("PROFILE", "OUT"):
                own = type(getattr(PROFILES["laptop"], name)).__name__
                assert (kind, default) == ("list" if own == "tuple" else own, None), f"{notebook}: {name}"


def test_one_name_means_one_thing():
    """Notebooks that read no Settings have no parameter of such a name. The others read one class: a name that two of
    them have is one field of it."""
    settings_of = {field.name for field in fields(Settings)}
    for notebook in (reproduce.BY_HAND, reproduce.CURVES, reproduce.SPEED, reproduce.EXPLORERS):
        assert not set(declared(notebook)) & settings_of, notebook
    for one in NUMBERED:
        for other in NUMBERED:
            first, second = declared(one), declared(other)
            assert all(first[name] == second[name] for name in first.keys() & second.keys())
    shared = {name for one in NUMBERED for other in NUMBERED if one != other
              for name in declared(one).keys() & declared(other).keys()}
    assert shared - {"PROFILE", "OUT"} == {"seed", "model", "frozen_layers", "learning_rate", "epochs", "n_seeds",
                                           "n_beams", "test_rows", "alphas", "valid_users", "bfloat16"}
