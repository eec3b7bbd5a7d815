"""The application's services: found by their class, and replaced by an object of that class."""

from dataclasses import dataclass

import pytest
from starlette.applications import Starlette

from service.web.services import find_service, provide_services


@dataclass(frozen=True)
class First:
    number: int


@dataclass(frozen=True)
class Second:
    number: int


def test_each_object_is_found_by_its_class_and_a_later_one_replaces_it():
    app = Starlette()
    provide_services(app, First(1), Second(2))
    provide_services(app, First(3))
    assert (find_service(app, First), find_service(app, Second)) == (First(3), Second(2))


def test_a_class_without_an_object_is_an_error():
    app = Starlette()
    provide_services(app, First(1))
    with pytest.raises(KeyError):
        find_service(app, Second)
