"""How long a server asks to be left alone."""

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


LONGEST_ASKED = 600.0


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """
    Seconds until a server wants to be asked again, by its `Retry-After`: a number or a date (RFC 9110, section 10.2.3), ten minutes at
    most; `None` if it does not say.
    """
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(text) - (now or datetime.now(UTC))).total_seconds()
        except (ValueError, TypeError):  # no date, or one without a time zone
            return None
    return min(max(seconds, 0.0), LONGEST_ASKED) if seconds == seconds else None
