"""The scheduler `math_tip_trick`: a wrong answer is taken back, once, and thought about again."""

from typing import Any

from swift.plugins.turns import MultiTurnScheduler, TurnChoice, TurnRequest
from swift.rewards.accuracy import grade_column

TIP = "But wait... It seems I made a mistake,"


class MathTips(MultiTurnScheduler):
    """Cuts a wrong answer off before its conclusion and goes on from `TIP`. Rows have a `solution`."""

    def check_finished(self, request: TurnRequest, choice: TurnChoice, turn: int) -> Any:
        text = request.messages[-1]["content"]
        if TIP in text or grade_column([text], [request.data_dict.get("solution")])[0] is not False:
            return True
        return super().check_finished(request, choice, turn)

    def step(self, request: TurnRequest, _choice: TurnChoice, _turn: int) -> Any:
        thoughts = request.messages[-1]["content"].partition("<answer>")[0].partition("</think>")[0]
        request.messages[-1]["content"] = thoughts + TIP
        return {"infer_request": request}
