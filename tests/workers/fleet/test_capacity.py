from service.protocol import Resources
from workers.fleet.capacity import Nodes, Placement, read_nodes


def _nodes(**total: Resources) -> Nodes:
    nodes = Nodes()
    nodes.update_nodes(total, total, now=0.0)
    return nodes


def _placement(node: str, cpus: int, gpus: float = 0.0) -> Placement:
    return Placement(node=node, resources=Resources(cpus=cpus, gpus=gpus))


def test_what_is_placed_is_not_offered_again() -> None:
    nodes = _nodes(a=Resources(cpus=3))
    nodes.place_run("run", _placement("a", 2), now=-9.0)
    assert nodes.next_offer() == _placement("a", 1)


def test_what_is_removed_is_offered_again() -> None:
    nodes = _nodes(a=Resources(cpus=3))
    nodes.place_run("run", _placement("a", 3), now=-9.0)
    assert nodes.next_offer() is None
    nodes.remove_run("run")
    assert nodes.next_offer() == _placement("a", 3)


def test_an_offer_is_of_one_node_and_every_node_has_its_turn() -> None:
    nodes = _nodes(a=Resources(cpus=1), b=Resources(cpus=2))
    offers = [nodes.next_offer() for _ in range(4)]
    assert offers[:2] == offers[2:]
    assert {offer.node for offer in offers} == {"a", "b"}


def test_tenths_of_a_gpu_add_up() -> None:
    nodes = _nodes(a=Resources(cpus=0, gpus=1.0))
    for run in range(10):
        assert nodes.next_offer().resources.gpus == round(1.0 - run / 10, 1)
        nodes.place_run(run, _placement("a", 0, 0.1), now=-9.0)
    assert nodes.next_offer() is None


def test_above_one_gpu_whole_ones_are_offered() -> None:
    nodes = _nodes(a=Resources(cpus=4, gpus=3.0))
    nodes.place_run("half", _placement("a", 1, 0.5), now=-9.0)
    assert nodes.next_offer() == _placement("a", 3, 2.0)
    nodes.place_run("two", _placement("a", 1, 2.0), now=-9.0)
    assert nodes.next_offer() == _placement("a", 2, 0.5)


def test_runs_of_a_lost_node_hold_nothing_elsewhere() -> None:
    nodes = _nodes(a=Resources(cpus=1), b=Resources(cpus=1))
    nodes.place_run("run", _placement("a", 1), now=-9.0)
    nodes.update_nodes({"b": Resources(cpus=1)}, {"b": Resources(cpus=1)}, now=0.0)
    assert nodes.next_offer() == _placement("b", 1)
    nodes.remove_run("run")


def test_a_node_that_shrank_offers_nothing_rather_than_less() -> None:
    nodes = _nodes(a=Resources(cpus=4))
    nodes.place_run("run", _placement("a", 4), now=-9.0)
    nodes.update_nodes({"a": Resources(cpus=2)}, {"a": Resources(cpus=2)}, now=0.0)
    assert nodes.next_offer() is None


def test_only_nodes_that_are_alive_count() -> None:
    raw = [
        {"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0, "memory": 1e9}},
        {"NodeID": "b", "Alive": False, "Resources": {"CPU": 8.0}},
        {"NodeID": "c", "Alive": True, "Resources": {"memory": 1e9}},
    ]
    assert read_nodes(raw) == {
        "a": Resources(cpus=2, gpus=1.0),
        "c": Resources(cpus=0, gpus=0.0),
    }


def test_what_others_use_is_not_offered() -> None:
    nodes = _nodes(a=Resources(cpus=8), b=Resources(cpus=8))
    total = {"a": Resources(cpus=8, gpus=1.0), "b": Resources(cpus=8)}
    nodes.update_nodes(total, {"a": Resources(cpus=3, gpus=0.25)}, now=0.0)
    assert nodes.next_offer() == nodes.next_offer() == _placement("a", 3, 0.25)


def test_a_run_placed_just_now_is_not_free_because_ray_counts_it_late() -> None:
    nodes, total = Nodes(), {"a": Resources(cpus=8)}
    nodes.place_run("run", _placement("a", 2), now=0.0)
    nodes.update_nodes(
        total, {"a": Resources(cpus=4)}, now=0.01
    )  # others use 4; Ray has not yet counted ours
    assert nodes.next_offer() == _placement("a", 2)
    nodes.update_nodes(total, {"a": Resources(cpus=2)}, now=2.0)
    assert nodes.next_offer() == _placement("a", 2)
