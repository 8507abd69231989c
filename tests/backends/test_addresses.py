"""Addresses are read again where a column holds other tensors, and only there."""

import torch

from lopt.backends.addresses import Followed, addresses


def test_a_column_changes_when_another_tensor_comes_into_it():
    first, second, third = torch.zeros(3, 4).unbind()
    followed = Followed()
    column = (first, second)
    assert followed.changed({0: column, 5: (third,)}) == {0: addresses(column), 5: [third.data_ptr()]}
    assert followed.changed({0: column, 5: (third,)}) == {}
    assert followed.changed({0: [first, second], 5: [third]}) == {}
    assert followed.changed({0: (first, third), 5: (third,)}) == {0: [first.data_ptr(), third.data_ptr()]}


def test_a_list_that_changes_in_place_is_seen():
    first, second = torch.zeros(2, 4).unbind()
    column, followed = [first], Followed()
    followed.changed({0: column})
    column[0] = second
    assert followed.changed({0: column}) == {0: [second.data_ptr()]}


def test_a_kind_of_state_that_is_not_there_has_no_addresses():
    followed = Followed()
    assert followed.changed({0: (), 1: []}) == {}
