import pytest

from ray_streamer.cli.rules import parse_rule
from ray_streamer.errors import ShardingError
from ray_streamer.settings import SECRET_SETTINGS, Settings
from ray_streamer.sharding import Replicate, Skip, Split, SplitVocabulary


@pytest.mark.parametrize("command", ["inspect", "plan", "load"])
def test_every_setting_is_an_option_with_its_description(invoke, command):
    text = " ".join(invoke(command, "--help").stdout.split())
    for name, field in Settings.model_fields.items():
        has_option = name not in SECRET_SETTINGS
        assert (f"--{name.replace('_', '-')} " in text) is has_option
        assert (field.description in text) is has_option
    assert "[default: 8 MiB]" in text


def test_a_setting_reaches_the_plan(invoke, checkpoint):
    assert '"block_bytes": 1048576' in invoke("plan", checkpoint, "--tp", 2, "--block-bytes", "1MiB", "--json").stdout


def test_an_option_beats_the_environment(invoke, checkpoint, monkeypatch):
    monkeypatch.setenv("RAY_STREAMER_BLOCK_BYTES", "2MiB")
    assert '"block_bytes": 2097152' in invoke("plan", checkpoint, "--tp", 2, "--json").stdout
    assert '"block_bytes": 1048576' in invoke("plan", checkpoint, "--tp", 2, "--block-bytes", "1MiB", "--json").stdout


def test_a_bad_variable_is_named(invoke, checkpoint, monkeypatch):
    monkeypatch.setenv("RAY_STREAMER_CONCURRENCY", "0")
    result = invoke("plan", checkpoint, "--tp", 2)
    assert result.exit_code == 1
    assert "environment variable RAY_STREAMER_CONCURRENCY='0'" in result.stderr
    monkeypatch.delenv("RAY_STREAMER_CONCURRENCY")
    monkeypatch.setenv("RUNAI_STREAMER_CONCURRENCY", "0")
    assert "environment variable RUNAI_STREAMER_CONCURRENCY='0'" in invoke("plan", checkpoint, "--tp", 2).stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--memory-limit", "much"),
        ("--concurrency", "0"),
        ("--direct-io", "maybe"),
        ("--block-bytes", "5000"),
        ("--read-timeout-seconds", "-1"),
        ("--rule", "*.weight"),
        ("--rule", "*.weight=split"),
        ("--rule", "*.weight=split:first"),
        ("--rule", "=skip"),
        ("--unmatched", "skip"),
        ("--layout", "megatron"),
        ("--tp", "0"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_names_the_option(invoke, option, value):
    result = invoke("plan", "/nowhere", "--tp", 2, option, value)
    assert result.exit_code == 2
    assert f"'{option}'" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("text", "glob", "placement"),
    [
        ("*.q.weight=split:0", "*.q.weight", Split(0)),
        ("*.o.weight=split:-1", "*.o.weight", Split(-1)),
        ("odd=name=replicate", "odd=name", Replicate()),
        ("*.rotary=skip", "*.rotary", Skip()),
        ("embed= vocabulary", "embed", SplitVocabulary()),
    ],
)
def test_rules(text, glob, placement):
    rule = parse_rule(text)
    assert (rule.glob, rule.placement, rule.optional) == (glob, placement, False)


def test_a_placement_that_is_none_lists_those_that_are():
    with pytest.raises(ShardingError, match="split:DIM, vocabulary, replicate or skip"):
        parse_rule("*=everywhere")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--fuse", "qkv_proj", "NAME=MODULE,MODULE"),
        ("--fuse", "qkv_proj=q_proj", "two or more modules"),
        ("--fuse", "qkv_proj=q_proj,q_proj", "two or more modules"),
        ("--fuse", "qkv_proj=q_proj,,v_proj", "two or more modules"),
        ("--fuse", "=q_proj,k_proj", "NAME=MODULE,MODULE"),
        ("--dtype", "int8", "bfloat16, float32, float64"),
        ("--dtype", "=float32", "GLOB=DTYPE"),
        ("--dtype", "*.bias=half", "GLOB=DTYPE"),
        ("--rename", "model", "EXPRESSION=REPLACEMENT"),
        ("--rename", "=model", "EXPRESSION=REPLACEMENT"),
        ("--rename", "(=x", "unterminated subpattern"),
        ("--rename", r"(a)=\2", "invalid group reference"),
        ("--rename", r"a=\g<b>", "unknown group name"),
        ("--experts", "[[0, 1], [2", "is no JSON"),
        ("--experts", "[0, 1]", "one list of experts for each group"),
        ("--experts", '{"first": [[0], [1]]}', "one list of experts for each group"),
        ("--experts", "[[0.5], [true]]", "one list of experts for each group"),
        ("--experts", "/no/such/file.json", "No such file"),
    ],
)
def test_a_bad_value_is_refused_before_anything_is_read_and_says_what_is_meant(invoke, option, value, said):
    result = invoke("plan", "/nowhere", "--tp", 2, option, value)
    assert result.exit_code == 2
    told = " ".join(result.stderr.replace("│", " ").split())
    assert f"'{option}'" in told
    assert said in told


@pytest.mark.parametrize(
    "options",
    [
        ("--fuse", "a=q,k", "--fuse", "b=q,v"),
        ("--fuse", "a=q,k", "--fuse", "a=x,v"),
        ("--fuse", "standard", "--fuse", "a=q_proj,k"),
        ("--dtype", "float32", "--dtype", "float16"),
        ("--dtype", "*.bias=float32", "--dtype", "*.bias=float16"),
    ],
    ids=" ".join,
)
def test_what_is_said_twice_is_wrong_usage(invoke, options):
    result = invoke("plan", "/nowhere", "--tp", 2, *options)
    assert result.exit_code == 2
    assert "is given twice" in " ".join(result.stderr.replace("│", " ").split())


def test_experts_without_groups_of_them_are_refused_in_flags(invoke):
    result = invoke("plan", "/nowhere", "--tp", 2, "--experts", "[[0], [1]]")
    assert result.exit_code == 1
    assert "give ep, too" in result.stderr.replace("--ep", "ep")
