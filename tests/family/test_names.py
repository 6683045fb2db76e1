"""Names and parameters: one canonical spelling, and errors that say what came, what is allowed and what was meant."""

import math

import numpy as np
import pytest
import torch

from hf_gem import EGEM, GemSpec, egem, gem, parse
from hf_gem.family.names import check_eps, check_n, is_claimed, is_name
from hf_gem.fit import Histogram, fit
from hf_gem.functional import activation, gem_glu
from hf_gem.modules import GemActivation

CANONICAL = {
    "gem": ("gem", 1, 1.0, False),
    "gem_n2": ("gem", 2, 1.0, False),
    "gem_n32": ("gem", 32, 1.0, False),
    "egem": ("egem", 1, 1e-4, False),
    "egem_n3": ("egem", 3, 1e-4, False),
    "egem_eps1": ("egem", 1, 1.0, False),
    "egem_n2_eps1em6": ("egem", 2, 1e-6, False),
    "egem_eps1.5em7": ("egem", 1, 1.5e-7, False),
    "egem_n4_eps1e30": ("egem", 4, 1e30, False),
    "egem_learnable": ("egem", 1, 1e-4, True),
    "segem": ("segem", 1, 1e-4, False),
    "segem_eps0.01": ("segem", 1, 0.01, False),
    "segem_n2_eps0.01_learnable": ("segem", 2, 0.01, True),
}


@pytest.mark.parametrize(("name", "parameters"), CANONICAL.items())
def test_canonical_names(name, parameters):
    spec = parse(name)
    assert (spec.family, spec.n, spec.eps, spec.learnable) == parameters
    assert spec.name == str(spec) == name
    assert GemSpec(*parameters).name == name


def test_every_spec_survives_its_name():
    generator = np.random.default_rng(0)
    for _ in range(500):
        family = str(generator.choice(["gem", "egem", "segem"]))
        n = int(generator.integers(1, 33))
        if family == "gem":
            spec = GemSpec(family, n)
        else:
            limit = min(200 * n * math.log10(2), 307)
            learnable = bool(generator.integers(2))
            limit = min(limit, 37) if learnable else limit
            spec = GemSpec(family, n, 10 ** generator.uniform(-limit, limit), learnable)
        assert parse(spec.name) == spec
        assert parse(spec.name.upper()) == spec
        assert "-" not in spec.name
        assert "+" not in spec.name


@pytest.mark.parametrize("number", ["1em6", "1e-6", "1e-06", "1em06", "0.000001", "1.0e-6", "1.e-6", "10e-7", "01e-6"])
def test_spellings_of_one_number(number):
    assert parse(f"egem_n2_eps{number}").name == "egem_n2_eps1em6"


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("GEM_N2", "gem_n2"),
        ("SeGem_EPS1E-2_Learnable", "segem_eps0.01_learnable"),
        ("gem_n1", "gem"),
        ("gem_n02", "gem_n2"),
        ("egem_n1_eps0.0001", "egem"),
        ("segem_eps1em4_learnable", "segem_learnable"),
        ("egem_eps1e+3", "egem_eps1000"),
    ],
)
def test_spellings_of_one_function(spelling, canonical):
    assert parse(spelling).name == canonical


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("gem_n0", "gem"),
        ("gem_n33", "gem_n32"),
        ("gem_2", None),
        ("gem_n2 ", "gem_n2"),
        ("gem-n2", "gem_n2"),
        ("gemn2", "gem_n2"),
        ("gem_n-2", "gem_n2"),
        ("gem_n2.5", "gem_n2"),
        ("gem_eps0.1", "egem_eps0.1"),
        ("gem_learnable", "egem_learnable"),
        ("egem_eps0", "egem"),
        ("egem_eps-1", "egem"),
        ("egem_epsnan", "egem"),
        ("egem_eps1e999", "egem"),
        ("egem_eps", "egem"),
        ("egem_n2_1e-6", None),
        ("egem_n2_epsilon=0.5", "egem_n2_eps0.5"),
        ("egem_eps0.5_n2", "egem_n2_eps0.5"),
        ("e-gem_n2", "egem_n2"),
        ("se-gem", "segem"),
        ("segem_learned", "segem_learnable"),
        ("segem_learnable_n3", "segem_n3_learnable"),
        ("", "gem"),
    ],
)
def test_malformed_names(name, nearest):
    with pytest.raises(ValueError, match="Did you mean") as error:
        parse(name)
    message = str(error.value)
    assert repr(name) in message
    assert "egem[_n<N>][_eps<E>][_learnable]" in message
    suggestion = message.rsplit("Did you mean ", 1)[1].strip("'?")
    assert parse(suggestion).name == suggestion
    if nearest is not None:
        assert suggestion == nearest
    assert not is_name(name)


def test_a_number_with_two_signs_is_malformed():
    with pytest.raises(ValueError, match=r"got activation name 'egem_eps1em-6'\. Allowed names: .* Did you mean"):
        parse("egem_eps1em-6")


def test_names_have_200_characters_at_most():
    longest = "egem_eps1." + "0" * 190
    assert parse(longest) == parse("egem_eps1")
    with pytest.raises(ValueError, match="Did you mean"):
        parse(longest + "0")


@pytest.mark.parametrize("name", [None, 2, b"gem", ["gem"]])
def test_a_name_is_a_string(name):
    with pytest.raises(TypeError, match="must be a string") as error:
        parse(name)
    assert repr(name) in str(error.value)
    assert not is_name(name)
    assert not is_claimed(name)


@pytest.mark.parametrize("n", [1, 32, np.int64(1), np.int64(32), np.uint8(2)])
def test_good_n(n):
    checked = check_n(n)
    assert type(checked) is int
    assert checked == n


@pytest.mark.parametrize("n", [True, False, 2.0, 1.5, np.float64(2), "2", None, 1j])
def test_n_of_another_type(n):
    for call in (check_n, lambda n: GemSpec("gem", n), EGEM, lambda n: gem(torch.ones(1), n)):
        with pytest.raises(TypeError, match="n must be an integer from 1 to 32") as error:
            call(n)
        assert repr(n) in str(error.value)


@pytest.mark.parametrize("n", [0, -1, 33, 10**30])
def test_n_out_of_range(n):
    for call in (check_n, lambda n: GemSpec("gem", n), EGEM, lambda n: gem(torch.ones(1), n)):
        with pytest.raises(ValueError, match=rf"got n={n}\. n must be an integer from 1 to 32\. "):
            call(n)


@pytest.mark.parametrize("eps", [1, 0.5, np.float32(0.5), np.int64(3), 1e-60, 1e60])
def test_good_eps(eps):
    checked = check_eps(eps)
    assert type(checked) is float
    assert checked == eps


EPS_TAKERS = (
    check_eps,
    lambda e: GemSpec("egem", 1, e),
    lambda e: EGEM(eps=e),
    lambda e: egem(torch.ones(1), eps=e),
)


@pytest.mark.parametrize("eps", [True, "0.1", b"1", 1j, [1.0]])
def test_eps_of_another_type(eps):
    for call in EPS_TAKERS:
        with pytest.raises(TypeError, match="eps must be a positive number") as error:
            call(eps)
        assert repr(eps) in str(error.value)


@pytest.mark.parametrize("eps", [0, 0.0, -1e-4, math.nan, math.inf, -math.inf, 1e-61, 1e61, np.float64("nan")])
def test_eps_out_of_range(eps):
    for call in EPS_TAKERS:
        with pytest.raises(ValueError, match="eps must") as error:
            call(eps)
        assert f"got eps={eps!r}." in str(error.value)


@pytest.mark.parametrize(("n", "limit"), [(1, 60), (2, 120), (3, 180), (4, 240), (5, 301)])
def test_the_limits_of_eps(n, limit):
    """For greater n, all positive numbers are allowed."""
    smallest = 5e-324
    with pytest.raises(ValueError, match=rf"eps must be between 1e-{limit} and 1e{limit} for n={n}\."):
        check_eps(smallest, n)
    for eps in (float(f"1e-{limit}"), float(f"1e{limit}")):
        assert check_eps(eps, n) == eps
    assert check_eps(smallest, 6) == smallest


def test_a_learnable_eps_starts_in_the_range_of_float32():
    for eps in (1e-37, 1e37):
        assert GemSpec("egem", 2, eps, learnable=True).eps == eps
    for eps in (0.9e-37, 1.1e37):
        with pytest.raises(
            ValueError, match=r"with learnable=True\. A learnable eps must start between 1e-37 and 1e37"
        ):
            GemSpec("egem", 2, eps, learnable=True)


def test_numbers_of_numpy_become_those_of_python():
    spec = GemSpec("egem", np.int64(2), np.float32(0.5))
    assert (type(spec.n), type(spec.eps)) == (int, float)


@pytest.mark.parametrize("given", ["gem_n2" + "2" * 10**5, "x" * 10**5, [0] * 10**5], ids=range(3))
def test_no_message_repeats_all_that_it_was_given(given):
    for call in (parse, GemSpec, check_n, check_eps, lambda given: GemSpec("egem", learnable=given)):
        with pytest.raises((TypeError, ValueError)) as error:
            call(given)
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("given", [10**5000, -(10**5000)], ids=("large", "small"))
def test_numbers_that_python_does_not_print(given):
    for call in (check_n, check_eps):
        with pytest.raises(ValueError, match=r"got .*=a huge integer"):
            call(given)


def test_a_name_with_a_bad_number_says_what_is_allowed():
    with pytest.raises(ValueError, match=r"got activation name 'gem_n0'\. n must be an integer from 1 to 32\. Allowed"):
        parse("gem_n0")
    with pytest.raises(ValueError, match=r"'egem_eps1em70'\. eps must be between 1e-60 and 1e60 for n=1\. Allowed"):
        parse("egem_eps1em70")
    with pytest.raises(ValueError, match=r"'gem_eps2'\. gem has a fixed eps of 1\. Allowed"):
        parse("gem_eps2")


@pytest.mark.parametrize("arguments", [("gem", 1, 0.5), ("gem", 2, None, True)])
def test_gem_has_no_eps_of_its_own(arguments):
    with pytest.raises(ValueError, match=r"gem has a fixed eps of 1\. Leave out .* the family 'egem'"):
        GemSpec(*arguments)


def test_unknown_family():
    with pytest.raises(ValueError, match=r"got family='gelu'\. .*gem, egem, segem"):
        GemSpec("gelu")


def test_a_family_that_is_in_no_table():
    histogram = Histogram()
    histogram.update(torch.ones(1))
    for use in (
        lambda: gem_glu(torch.ones(1), torch.ones(1), "xgem"),
        lambda: activation(torch.ones(1), "xgem"),
        lambda: GemActivation("xgem"),
        lambda: fit(histogram, torch.relu, "xgem"),
    ):
        with pytest.raises(ValueError, match=r"got family='xgem'.*gem, egem, segem.*hf_gem\.register_family"):
            use()


def test_specs_are_values():
    assert GemSpec("egem", 2) == parse("egem_n2")
    assert len({GemSpec("gem"), parse("gem"), parse("gem_n1")}) == 1
    with pytest.raises(AttributeError):
        parse("gem").n = 2


@pytest.mark.parametrize(
    "name",
    [
        "gemma",
        "gemma2",
        "gemma3n",
        "gemini",
        "gemm",
        "gemv",
        "gems",
        "germ",
        "gelu",
        "gelu_new",
        "egemma",
        "stegem",
        "",
        "gemma_n3",
        "gemini_n2",
        "gegelu_n2",
        "seglu_n2",
        "segment_n3",
        "segelu_n2",
        "ge_n1",
        "age_n1",
        "gelu_n2",
        "yourgem_n2",
    ],
)
def test_words_that_are_not_ours(name):
    assert not is_claimed(name)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("gme_n2", "gem_n2"),
        ("egm_n2_eps0.1", "egem_n2_eps0.1"),
        ("segm_learnable", "segem_learnable"),
        ("segm", "segem"),
    ],
)
def test_misspelled_families(name, nearest):
    with pytest.raises(ValueError, match=rf"No family is called '{name.partition('_')[0]}'.*Did you mean '{nearest}'"):
        parse(name)
    assert is_claimed(name) == ("_" in name)  # a word without parameters may be a name of another library


@pytest.mark.parametrize("name", ["softer_n2", "yourgem", "yourgem_n2_eps0.1"])
def test_families_that_may_be_yours(name):
    message = (
        r"Allowed names: gem.* If it is your own, register it first, with hf_gem\.register_family or in \$HF_GEM_FAM"
    )
    with pytest.raises(ValueError, match=message):
        parse(name)


@pytest.mark.parametrize("name", ["gem", "gem_n0", "GEM-N2", "gemn2", "gem2", "e-gem", "segem_eps", "egem n2", "gem!"])
def test_words_that_can_only_be_ours(name):
    assert is_claimed(name)


@pytest.mark.parametrize("word", ["gme", "egm", "seegm", "egme", "sgem", "segm", "geem", "seggem", "xgem"])
def test_slips_are_ours_if_parameters_follow(word):
    for parameters in ("_n2", "_eps0.1", "_learnable", "_n0_eps-1"):
        assert is_claimed(word + parameters)
    assert not is_claimed(word)
    assert not is_claimed(f"{word}_n")
    assert not is_claimed(f"{word}_new")


def test_no_stock_activation_is_claimed():
    create_act = pytest.importorskip("timm.layers.create_act")
    activations = pytest.importorskip("transformers.activations")
    dicts = (activations.ACT2FN, activations.ACT2CLS, create_act._ACT_LAYER_DEFAULT, create_act._ACT_FN_DEFAULT)
    dicts += (create_act._ACT_LAYER_ME, create_act._ACT_FN_ME)
    names = {name for registry in dicts for name in registry}
    assert {"gelu", "silu", "hard_swish"} <= names
    assert not [name for name in names if is_claimed(name)]


@pytest.mark.parametrize("name", ["relu", "gelu_new", "my act"])
def test_names_of_others_have_no_nearest(name):
    with pytest.raises(ValueError, match=r"which is not one of the family\. Allowed names: .* Write") as error:
        parse(name)
    assert "Did you mean" not in str(error.value)
