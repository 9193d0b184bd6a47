import pytest

from cheaper.evaluation.mathematics import process_results


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("3 + 4 = <<3+4=7>>7\n#### 7", " 3 + 4 = 7\n#### 7", True),
        ("#### 1,234", "so the answer is \\boxed{1234}.", True),
        ("\\frac{1}{2}", "Final Answer: The final answer is $0.5$. I hope it is correct.", True),
        ("[2,5)", "The domain is $\\boxed{[2,5)}$", True),
        ("#### 7", "3 + 4 = 8\n#### 8", False),
        (204, "I do not know.", False),
    ],
)
def test_answers(gold, answer, right):
    assert process_results({"answer": gold}, [[answer]]) == {"math_verify": float(right)}


def test_the_score_is_a_mean_over_samples():
    assert process_results({"Answer": 5}, [["\\boxed{5}", "\\boxed{6}", "5", "4"]]) == {"math_verify": 0.5}
