import pytest
import torch

from heretic_kl.ablation import Directions, ResidualMean, difference_of_means, winsorize


def test_streaming_mean_equals_the_mean_of_everything():
    residuals = torch.randn(37, 3, 8, generator=torch.Generator().manual_seed(0))
    mean = ResidualMean()
    for part in residuals.split(5):
        mean.add(part)
    assert mean.count == 37
    torch.testing.assert_close(mean.mean, residuals.double().mean(dim=0))


def test_winsorizing_limits_magnitudes_vector_by_vector():
    values = torch.tensor([[1.0, -2.0, 3.0, -100.0], [0.1, 0.2, -0.3, 0.4]])
    limited = winsorize(values, 0.75)
    assert limited.tolist() == [[1.0, -2.0, 3.0, -3.0], pytest.approx([0.1, 0.2, -0.3, 0.3])]
    assert torch.equal(winsorize(values, 1.0), values)


def test_winsorized_mean_ignores_one_massive_component():
    mean = ResidualMean(winsorize_quantile=0.9)
    spike = torch.ones(1, 1, 20)
    spike[0, 0, 7] = 1e4
    mean.add(spike)
    assert float(mean.mean.max()) == 1.0


def test_direction_points_from_baseline_to_target():
    target, baseline = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    directions = difference_of_means(target, baseline)
    assert directions.per_layer.tolist() == [[1.0, 0.0]]


def test_projection_off_the_baseline_is_orthogonal_to_it():
    generator = torch.Generator().manual_seed(1)
    target, baseline = torch.randn(4, 16, generator=generator), torch.randn(4, 16)
    directions = difference_of_means(target, baseline, project_off_baseline=True)
    along = (directions.per_layer.double() * baseline.double()).sum(dim=-1)
    assert float(along.abs().max()) < 1e-6
    torch.testing.assert_close(directions.per_layer.norm(dim=-1), torch.ones(4))


def test_interpolation_meets_the_layers_and_stays_a_unit():
    directions = Directions(torch.eye(3))
    assert torch.equal(directions.at(1.0), torch.eye(3)[1])
    between = directions.at(0.5)
    torch.testing.assert_close(between, torch.tensor([0.5, 0.5, 0.0]) / 0.5**0.5)
    assert torch.equal(directions.at(2.0), torch.eye(3)[2])
    with pytest.raises(ValueError, match=r"0\.\.2, got 2\.5"):
        directions.at(2.5)


def test_bad_input_says_what_is_wrong():
    same = torch.ones(2, 4)
    with pytest.raises(ValueError, match="no direction in any layer"):
        difference_of_means(same, same)
    with pytest.raises(ValueError, match=r"\(2, 4\) and \(3, 4\)"):
        difference_of_means(same, torch.ones(3, 4))
    with pytest.raises(ValueError, match="no residuals"):
        _ = ResidualMean().mean
    with pytest.raises(ValueError, match="winsorize_quantile"):
        ResidualMean(winsorize_quantile=0)


def test_layers_whose_means_coincide_take_the_direction_of_the_next_layer():
    baseline = torch.ones(5, 4)
    target = baseline.clone()
    target[1, 0] += 1
    target[3, 2] += 1
    target[0] += 1e-9  # rounding
    directions = difference_of_means(target, baseline).per_layer
    assert directions.argmax(dim=1).tolist() == [0, 0, 2, 2, 2]
