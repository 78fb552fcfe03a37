"""query: any new query, or a stored row, answered from the store, which is only read."""

from gradstore.stages.query.answer import Answer, Ranking, Winner
from gradstore.stages.query.session import Session

__all__ = ["Answer", "Ranking", "Session", "Winner"]
