import dataclasses
import math

from service.protocol import Timing
from warmcore.training.events import EvaluationEvent, StepEvent
from workers.attempt.measurements import Curve, add_step_time


def _step(step: int, *, seconds: float = 0.5, loss: float = 2.0, norm: float = 1.0) -> StepEvent:
    return StepEvent(
        step=step, tokens=step * 10, loss_nats=loss, lr=0.1, grad_norm=norm, seconds=seconds
    )


def _evaluation(step: int, evaluation: int, loss: float = 3.0) -> EvaluationEvent:
    return EvaluationEvent(
        step=step, tokens=step * 10, evaluation=evaluation, val_loss_nats=loss, seconds=9.0
    )


def _curve(log_every: int = 2) -> Curve:
    return Curve(log_every=log_every, tokens=0)


def test_a_step_and_its_evaluation_are_one_measurement() -> None:
    curve = _curve()
    assert curve.add_event(_step(1)) is None
    assert curve.add_event(_step(2)) is None
    measurement = curve.add_event(_evaluation(2, 1))
    assert (measurement.loss_nats, measurement.val_loss_nats, measurement.evaluation) == (2, 3, 1)
    assert curve.take_measurement() is None


def test_the_evaluation_before_training_is_no_rung() -> None:
    measurement = _curve().add_event(_evaluation(0, 0))
    assert (measurement.step, measurement.val_loss_nats, measurement.evaluation) == (0, 3, None)
    assert measurement.loss_nats is None


def test_steps_between_are_measured_nowhere_and_their_time_is_kept() -> None:
    curve = _curve(log_every=3)
    given = [curve.add_event(_step(step)) for step in range(1, 8)]
    measured = [m for m in given if m]
    assert [m.step for m in measured] == [3, 6]
    assert [m.train_seconds for m in measured] == [1.5, 1.5]
    assert measured[1].tokens_per_second == 20


def test_an_evaluation_measures_a_step_that_is_not_logged() -> None:
    curve = _curve(log_every=100)
    curve.add_event(_step(1))
    measurement = curve.add_event(_evaluation(1, 1))
    assert (measurement.step, measurement.loss_nats) == (1, 2.0)


def test_time_in_evaluations_is_no_train_time() -> None:
    curve = _curve(log_every=1)
    curve.add_event(_step(1))
    first = curve.add_event(_evaluation(1, 1))
    curve.add_event(_step(2))
    assert first.train_seconds == curve.take_measurement().train_seconds == 0.5


def test_taking_gives_the_present_step_once() -> None:
    curve = _curve(log_every=1)
    curve.add_event(_step(1))
    assert curve.take_measurement().step == 1
    assert curve.take_measurement() is None
    assert curve.add_event(_step(2)) is None


def test_numbers_that_are_not_finite_are_left_out() -> None:
    curve = _curve(log_every=1)
    curve.add_event(_step(1, loss=math.nan, norm=math.inf, seconds=0.0))
    measurement = curve.take_measurement()
    assert measurement.loss_nats is measurement.grad_norm is measurement.tokens_per_second is None


def test_losses_of_averages_stand_beside_the_weights_own() -> None:
    event = dataclasses.replace(
        _evaluation(2, 1), ema_val_loss_nats=2.5, swa_val_loss_nats=math.inf
    )
    measurement = _curve().add_event(event)
    assert (measurement.val_loss_nats, measurement.ema_val_loss_nats) == (3, 2.5)
    assert measurement.swa_val_loss_nats is None


def test_the_time_before_the_first_step_is_start_up_and_steps_add_up() -> None:
    first = add_step_time(Timing(), _step(1, seconds=0.5), now=102.5, leased_at=100.0)
    assert (first.first_step_at, first.startup_seconds, first.train_seconds) == (102.0, 2.0, 0.5)
    second = add_step_time(first, _step(2, seconds=0.25), now=103.0, leased_at=100.0)
    assert (second.first_step_at, second.last_step_at) == (102.0, 103.0)
    assert (second.startup_seconds, second.train_seconds) == (2.0, 0.75)
