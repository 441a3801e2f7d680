"""The oracle: who says which response is better, alone (`oracles`) and as a Ray Serve service (`deployment`)."""

from rayalign.serve.client import OracleClient, start_oracle, stop_oracle
from rayalign.serve.config import OracleConfig

__all__ = ["OracleClient", "OracleConfig", "start_oracle", "stop_oracle"]
