import numpy as np
import pytest

from dpo.training.preflight import check_first_loss


def test_a_first_loss_off_the_reference_is_refused():
    with pytest.raises(ValueError, match=r"first loss is 0\.70.*must be 0\.693147"):
        check_first_loss(0.70, float(np.log(2)), "float32")
    with pytest.raises(ValueError, match="first loss is nan"):
        check_first_loss(float("nan"), 0.69, "float32")
    check_first_loss(0.6932, float(np.log(2)), "float32")
