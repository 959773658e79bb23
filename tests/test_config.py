import pytest

from medfast.config import TrainConfig, resumed
from medfast.errors import UsageError


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"method": "loacl"}, "'local'.*Known: clip, cyclip, declip, filip, lit, local, slip"),
        ({"model": "tinny"}, "'tiny'.*Known: tiny, vit_b16, vit_b16_bert, vit_b16_clip"),
        ({"precision": "fp23"}, "'fp32'"),
        ({"train_data": "rocco:/x"}, "'roco'"),
        ({"train_data": "roco"}, "roco:FOLDER"),
        ({"train_data": "phantom:/x"}, "--cache-dir"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"lr": float("nan")}, "--lr must be finite; got nan"),
        ({"wd": float("inf")}, "--wd must be finite"),
        ({"seed": 2**63}, "--seed must be 0 or more and below"),
        ({"epochs": "3"}, "--epochs must be int; got '3'"),
        ({"workers": True}, "--workers must be int"),
        ({"max_bad_samples": 2}, "--max-bad-samples must be a share"),
        ({"name": ""}, "--name must be a plain folder name.*got ''"),
        ({"name": "a\nb"}, "--name must be a plain folder name"),
        ({"name": "x" * 300}, "--name must be a plain folder name"),
        ({"logs": ""}, "--logs must be a folder; got ''"),
        ({"train_data": "/data/roco"}, "roco:/data/roco"),
        ({"train_data": ()}, "--train-data must be at least one source; got none"),
        (
            {"train_data": ("roco:/a", "roco:/a")},
            "must be sources that differ; got roco:/a roco:/a",
        ),
        ({"train_data": 3}, "--train-data must be a list; got 3"),
        ({"train_data": (3,)}, "--train-data must be str; got 3"),
        ({"train_data_weights": (1.0, 2.0)}, r"as many as there are sources \(1\)"),
        ({"train_data_weights": (0.0,)}, "--train-data-weights must be above 0"),
        ({"train_data_weights": (float("nan"),)}, "--train-data-weights must be finite"),
        ({"csv_separator": "::"}, "--csv-separator must be a single character"),
        ({"csv_img_key": ""}, "--csv-img-key must be the name of a column"),
        ({"loader": "dally"}, "'dali'"),
        ({"save_steps": -1}, "--save-steps must be 0 or more"),
        ({"name": "../x"}, "--name must be a plain folder name"),
        ({"grad_clip_norm": -1.0}, "--grad-clip-norm must be above 0"),
        ({"accum_freq": 0}, "--accum-freq must be at least 1"),
        ({"early_stop": -1}, "--early-stop must be 0 or more"),
        ({"force_image_size": 0}, "--force-image-size must be at least 1"),
        ({"force_context_length": 2}, "--force-context-length must be at least 3"),
        ({"resize_short": 64}, "--resize-short must be at least the model's image size, 96"),
        ({"optimizer": "adam"}, "'adamw'"),
        ({"loss_weights": ("clip",)}, "--loss-weights must be TERM=X"),
        ({"loss_weights": ("clip=-1",)}, "--loss-weights must be TERM=X .* got 'clip=-1'"),
        ({"loss_weights": ("clip=nan",)}, "--loss-weights must be TERM=X"),
        (
            {"pretrained": "a", "pretrained_text": "b"},
            "--pretrained-text and --pretrained are both given",
        ),
    ],
)
def test_a_wrong_setting_is_refused_by_its_flag(setting, says):
    with pytest.raises(UsageError, match=says):
        TrainConfig(**setting)


def test_a_whole_number_is_a_number():
    assert TrainConfig(lr=1).lr == 1


def test_a_resumed_run_keeps_its_own_settings():
    saved = {"lr": 0.5, "seed": 3, "log_every": 7}
    config = resumed(TrainConfig(log_every=9), {"log_every"}, saved)
    assert (config.lr, config.seed, config.log_every) == (0.5, 3, 9)


def test_a_resumed_run_refuses_what_would_change_its_numbers():
    with pytest.raises(UsageError, match=r"--lr is 0\.5 in this run and 0\.1 now"):
        resumed(TrainConfig(lr=0.1), {"lr"}, {"lr": 0.5})


def test_a_resumed_run_may_find_its_data_elsewhere():
    config = resumed(TrainConfig(train_data="roco:/b"), {"train_data"}, {"train_data": "roco:/a"})
    assert config.train_data == ("roco:/b",)
    with pytest.raises(UsageError, match="--train-data is roco:/a in this run"):
        resumed(TrainConfig(train_data="phantom"), {"train_data"}, {"train_data": "roco:/a"})


def test_settings_of_another_version_are_refused():
    with pytest.raises(UsageError, match="do not fit this version"):
        resumed(TrainConfig(), (), {"no_such_setting": 1})


def test_a_config_file_may_name_sources_as_a_word_or_a_list():
    assert TrainConfig(train_data="roco:/a").sources == [("roco", "/a")]
    config = TrainConfig(train_data=["roco:/a", "pmc_oa:/b"], train_data_weights=[1, 2.5])
    assert config.sources == [("roco", "/a"), ("pmc_oa", "/b")]
    assert config.dataset == "roco+pmc_oa"
    assert config.train_data_weights == (1, 2.5)


def test_sizes_that_are_forced_replace_the_presets():
    assert (TrainConfig().preset.image_size, TrainConfig().preset.context_length) == (96, 48)
    preset = TrainConfig(force_image_size=64, force_context_length=20).preset
    assert (preset.image_size, preset.context_length) == (64, 20)


def test_weights_of_terms_are_read_by_name():
    assert TrainConfig(loss_weights=["clip=0.5", "local=2"]).term_weights == {
        "clip": 0.5,
        "local": 2,
    }
