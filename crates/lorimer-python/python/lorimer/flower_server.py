"""FLoRA's server as a Flower app: `serverapp = "lorimer.flower_server:app"`, its settings in `[tool.flwr.app.config]`."""

import json

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from lorimer.flower import Flora

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the rounds. `ranks` ("16,8,4"), `rounds`, `clients`, `least`, `timeout` (seconds of a round), `output`, `settings` (JSON of `Base.train`'s)."""
    given = context.run_config
    strategy = Flora(
        ranks=[int(rank) for rank in str(given["ranks"]).split(",")],
        output=str(given["output"]),
        clients=int(given["clients"]),
        least=int(given.get("least", 1)),
        most_bytes=int(given.get("most-bytes", 1 << 30)),
        clip=float(given.get("clip", 0.0)),
        noise=float(given.get("noise", 0.0)),
        **json.loads(str(given.get("settings", "{}"))),
    )
    strategy.start(grid, strategy.initial(), num_rounds=int(given["rounds"]), timeout=float(given.get("timeout", 3600)))
