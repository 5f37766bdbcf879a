"""The coordinator. Flower's phone-home is off for every module below, whatever the environment says."""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
