"""The coordinator. Flower's phone-home is off for every module below, whatever the environment says."""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read at its import; else a line to stderr for each failed handshake
