"""Which tests are run once, on the pinned releases, and not again on the newest ones (the mark `once`; .ci/run).

Everything runs with `make test`. The second environment is there for what other releases change: numpy's promotion and
casts, what LiteRT, cryptography, paho, msgspec, SQLAlchemy and their like do, and TensorFlow's absence. Left out there
is what asks nothing of them that another test of the same file does not ask (tests/architecture/test_once.py):

- broken copies: that a test catches what it is there to catch is known when it has caught it once;
- long searches for an order of events (a power cut at every write, a kill between any two steps, a hostile broker's
  every move) that our own state machines get wrong: the calls into libraries are those of the undisturbed run;
- the second and later starts of thirty real processes, and of the benchmarks' programs, whose parts have tests.

Whatever compares numbers, bytes, files, databases or refusals of a library stays in both environments.
"""

from __future__ import annotations

import re

BROKEN_COPIES = re.compile(r"test_\w+_(is|are)_(caught|noticed)")
"""What a test is called that breaks our code on purpose, and expects the check beside it to fail."""

SEARCHES = {
    # Power that is lost at any statement of a migration stays in both: tests/aggregator/store/test_migrations.py.
    "tests/aggregator/test_upgrade.py": (
        "test_an_upgrade_that_is_killed_leaves_the_old_database_and_the_next_goes_through",
    ),
    "tests/device_client/recordings/test_window_store_power_cuts.py": (
        "test_windows_survive_a_power_cut_at_every_boundary_of_three_days",
    ),
    "tests/device_client/test_embedding.py": ("test_killed_again_and_again_it_goes_on_and_is_charged_once_a_round",),
    "tests/device_client/test_session_fuzz.py": (
        "test_no_hostile_broker_breaks_a_rule",
        "test_the_same_cases_without_a_fault_break_no_rule",
    ),
    "tests/device_client/test_session_restarts.py": (
        "test_one_coin_and_one_participation_a_round_wherever_the_power_fails",
    ),
    "tests/system/test_degraded.py": (
        "test_a_disk_that_is_full_or_cannot_be_read_for_a_minute",
        "test_a_process_killed_while_its_database_is_away_loses_nothing_that_has_a_receipt",
    ),
    "tests/system/test_power_cuts.py": (
        "test_weeks_full_of_power_cuts_keep_every_promise",
        "test_a_day_cut_at_every_single_operation_keeps_every_promise",
        "test_weeks_in_which_the_card_fills_up_too_lose_no_charge_no_update_and_no_recording",
        "test_the_weeks_have_everything_in_them_that_can_go_wrong",
    ),
    "tests/system/test_scale_out.py": (
        "test_a_worker_killed_between_any_two_steps_loses_and_doubles_nothing",
        "test_a_worker_that_loses_power_at_any_statement_loses_and_doubles_nothing",
        "test_an_aggregator_that_loses_power_at_any_blob_loses_and_doubles_nothing",
    ),
    "tests/system/test_secure_outages.py": (
        "test_an_aggregator_killed_again_and_again_loses_and_doubles_nothing",
        "test_an_aggregator_that_loses_power_at_any_statement_loses_and_doubles_nothing",
        "test_a_helper_that_loses_power_at_any_statement_answers_one_list_a_round",
    ),
    "tests/system/test_whole_studies.py": (
        "test_an_aggregator_that_loses_power_at_any_statement_loses_and_doubles_nothing",
        "test_an_aggregator_killed_again_and_again_still_finishes",
        "test_a_device_that_loses_power_at_any_write_releases_no_more_than_it_was_charged",
        "test_a_device_killed_between_any_two_steps_is_charged_once_per_round",
    ),
}

MANY_PROCESSES = {
    # Of the demos, the one over mosquitto with secure aggregation is run in both environments. The transport over
    # iotcore is in tests/contracts, and what a kill leaves behind is our own bookkeeping.
    "tests/firmware_sim/test_demo.py": (
        "test_the_demo_over_iotcore_without_noise_ends_with_a_model_that_runs",
        "test_a_killed_aggregator_wrist_and_helper_lose_nothing_and_count_nothing_twice",
        "test_a_demo_that_is_interrupted_leaves_nothing_running_and_is_resumed",
        "test_a_demo_with_the_engine_open_that_is_killed_leaves_nothing_running",
    ),
    # The page's commands are each run in process by the rooms' own tests; its certificates in test_broker_security.py.
    "tests/firmware_sim/test_operations_by_hand.py": (
        "test_the_page_followed_by_hand_trains_a_model",
        "test_the_pages_certificates_and_acl_let_aggregator_and_worker_in",
    ),
    # What is measured against a virtual fleet is in both; here processes are only ended.
    "tests/system/test_virtual_against_live.py": ("test_ctrl_c_ends_every_process_and_leaves_results",),
    "tests/benchmarks/test_aggregator_load.py": ("test_a_tiny_load_goes_through_and_both_rounds_close",),
    "tests/benchmarks/test_device_footprint.py": ("test_an_install_is_what_pip_added",),
    "tests/benchmarks/test_peers.py": (
        "test_an_environment_that_cannot_be_made_gives_one_sentence",
        "test_an_environment_is_made_once",
    ),
    "tests/benchmarks/test_update_encodings.py": ("test_every_encoding_is_timed",),
}


def runs_once(file: str, function: str) -> bool:
    """Whether a test is left out on the newest releases.

    Args:
        file: as pytest names it, from the repository's root.
        function: its name, without a class and without parameters.
    """
    named = (*SEARCHES.get(file, ()), *MANY_PROCESSES.get(file, ()))
    return function in named or BROKEN_COPIES.fullmatch(function) is not None
