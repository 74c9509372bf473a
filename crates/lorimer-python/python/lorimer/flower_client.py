"""A client as a Flower app: `clientapp = "lorimer.flower_client:app"`; `--node-config 'partition-id=0 model="…" data="…"'` says its base and rows."""

from lorimer.flower import client_app

app = client_app(lambda context: str(context.node_config["model"]), data=lambda context: str(context.node_config["data"]))
