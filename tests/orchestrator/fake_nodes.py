"""The provider of nodes for Ray's autoscaler in tests, which starts them on this machine."""

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Provider(FakeMultiNodeProvider):
    """Ray's own one, under a name that can be given as an external provider: the built-in type needs a file that wheels lack."""
