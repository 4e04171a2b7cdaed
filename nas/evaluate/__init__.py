"""Accuracy: of subnets by the supernet's weights (`SubnetEvaluator`), and of networks on their own (`Standalone`)."""

from nas.evaluate.standalone import Standalone
from nas.evaluate.subnets import SubnetEvaluator

__all__ = ["Standalone", "SubnetEvaluator"]
