"""The tables of the studies of replicas (bench/replicas/)."""

from bench.rows.columns import Column, Kind
from bench.rows.formats import CASE, FAILURE, MEASURED, number, percent

FORM = Column("form", "impl")
MAKESPAN = Column(" makespan s", "makespan_s", number(".1f"))
TOKENS_PER_SECOND = Column(" tokens/s", "tokens_per_second", number(".1f"))

SCALE = Kind(
    f"replicas against one: {{case}}{MEASURED}",
    (
        *(FORM, MAKESPAN, TOKENS_PER_SECOND),
        Column(" x one", "gain", number(".2f")),
        Column(" min", "gain_min", number(".2f")),
        Column(" max", "gain_max", number(".2f")),
        Column(" x processes", "over_plain", number(".2f")),
        FAILURE,
    ),
)
KILL = Kind(
    f"killed: {{case}}{MEASURED}",
    (
        *(FORM, MAKESPAN, TOKENS_PER_SECOND),
        Column(" kills", "kills"),
        Column(" rollouts", "rollouts"),
        Column(" resumed", "resumed_rollouts"),
        Column(" rollouts again", "rollouts_again"),
        Column(" tokens again", "tokens_again"),
        FAILURE,
    ),
)
REPLAY = Kind(
    f"simulated cluster against replicas: {{case}}{MEASURED}",
    (
        *(FORM, MAKESPAN),
        Column(" min", "makespan_min_s", number(".1f")),
        Column(" max", "makespan_max_s", number(".1f")),
        Column(" simulated", "makespan_simulated_s", number(".1f")),
        Column(" error", "makespan_error", percent("+.1f")),
        Column(" time to answer s", "tta_mean_s", number(".1f")),
        Column(" simulated", "tta_mean_simulated_s", number(".1f")),
        Column(" error", "tta_error", percent("+.1f")),
        Column(" moved", "moved", number(".0f")),
        Column(" simulated", "moved_simulated", number(".0f")),
        FAILURE,
    ),
)
OVERHEAD = Kind(
    f"the coordinator's time{MEASURED}",
    (
        *(CASE, FORM),
        Column(" us per problem", "per_problem_us", number(",.0f")),
        Column(" us per report", "per_report_us", number(",.1f")),
        Column(" reports", "reports"),
        Column(" moved", "moved"),
        FAILURE,
    ),
)
REPLICAS = {
    "replica_scale": SCALE,
    "replica_kill": KILL,
    "replica_replay": REPLAY,
    "replica_overhead": OVERHEAD,
}
