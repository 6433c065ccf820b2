import json

from crate_ray.runs import Intervention, write_interventions


def test_runs_shows_state_step_and_last_numbers(invoke, make_run, tmp_path):
    make_run("done", train__loss=0.31, eval__loss=0.4, eval__knn_top1=0.625, final__probe_top1=0.9)
    result = invoke("runs", tmp_path / "out")
    assert result.code == 0
    cells = result.out.splitlines()[1].split()
    assert cells[:8] == ["done", "FINISHED", "20/600", "0.310", "0.400", "62.5%", "90.0%", "90"]
    assert cells[8:] == ["s"]


def test_a_run_whose_driver_died_is_stale_and_one_that_never_started_is_new(invoke, make_run, tmp_path):
    make_run("dead", "RUNNING", beat_s_ago=600)
    make_run("alive", "RUNNING", beat_s_ago=5)
    make_run("fresh", None)
    rows = {row["name"]: row for row in json.loads(invoke("runs", tmp_path / "out", "--json").out)}
    assert {name: row["state"] for name, row in rows.items()} == {"alive": "RUNNING", "dead": "STALE", "fresh": "NEW"}
    assert 600 <= rows["dead"]["heartbeat_age_s"] < 660
    assert rows["fresh"]["step"] is None
    assert "tracking reap" in invoke("runs", tmp_path / "out").out


def test_a_configuration_of_another_release_does_not_hide_the_other_runs(invoke, make_run, tmp_path):
    odd = make_run("odd")
    make_run("plain")
    (tmp_path / "out" / "odd" / "config.yaml").write_text("no_such_key: 1\n")
    rows = {row["name"]: row for row in json.loads(invoke("runs", tmp_path / "out", "--json").out)}
    assert set(rows) == {odd.name, "plain"}
    assert "no_such_key" in rows["odd"]["reason"]


def test_a_run_that_was_rolled_back_is_flagged(invoke, make_run, tmp_path):
    rolled_back = Intervention(
        from_step=40,
        first_step=46,
        last_step=50,
        skipped_steps=5,
        pass_over=(720, 800),
        lr_factor=0.5,
        lr_steps=100,
        finding="weights of `head` hold NaN or infinity",
        time=0.0,
        attempt=1,
    )
    write_interventions(make_run("helped"), [rolled_back])
    make_run("alone")
    assert "helped: 1 rollback (from step 50 to 40)" in invoke("runs", tmp_path / "out").out
    rows = {row["name"]: row for row in json.loads(invoke("runs", tmp_path / "out", "--json").out)}
    assert rows["helped"]["interventions"] == "1 rollback (from step 50 to 40)"
    assert rows["alone"]["interventions"] is None


def test_an_empty_root_says_so(invoke, tmp_path):
    result = invoke("runs", tmp_path)
    assert result.code == 0
    assert f"no runs in {tmp_path} yet" in result.out
    assert json.loads(invoke("runs", tmp_path, "--json").out) == []


def test_a_missing_root_is_an_error(invoke, tmp_path):
    result = invoke("runs", tmp_path / "nowhere")
    assert result.code == 2
    assert "nowhere' does not exist" in result.err


def test_trials_stand_below_the_name_of_their_sweep(invoke, make_run, tmp_path):
    make_run("plain", train__loss=0.5)
    sweep = tmp_path / "out" / "depth"
    (sweep / "trials").mkdir(parents=True)
    (sweep / "sweep.yaml").write_text("name: depth\n")
    for name, state in (("crate-01", "FINISHED"), ("vit-01", "FAILED")):
        make_run(name, state)
        (tmp_path / "out" / name).rename(sweep / "trials" / name)
    lines = invoke("runs", tmp_path / "out").out.splitlines()
    assert lines[1].split()[0] == "plain"
    title = lines.index("sweep depth, new; trials: 1 finished, 1 failed")
    assert [line.split()[:2] for line in lines[title + 2 : title + 4]] == [["crate-01", "FINISHED"], ["vit-01", "FAILED"]]
    rows = json.loads(invoke("runs", tmp_path / "out", "--json").out)
    assert {row["name"]: row["sweep"] for row in rows} == {"plain": None, "crate-01": str(sweep), "vit-01": str(sweep)}
    assert invoke("runs", sweep).out.splitlines()[1] == lines[title]
