/*-------------------------------------------------------------------------
 *
 * bisect.c
 *	  Set handlers: how many items a call gets, and what follows when it fails.
 *
 * A call that fails says nothing of which item is to blame, so its first half is
 * called next, and so on, until one item is left: that one fails with the error it
 * then raises.  A half that succeeds is good and done; the bad item is in the
 * other half, which need not be called as a whole.  What was behind the half that
 * failed is not remembered: it is part of the next call, with items behind it.
 * With calls of about 1/p items, p being the rate of failures, that is generalized
 * binary splitting, about k log2(n/k) calls for k bad items of n.  Fewest calls
 * would take twice the length that we use; but items that are run for nothing cost,
 * too.
 *
 * The only state is chunk->fails_to, so an interval may end after any call.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <math.h>

#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "flow/bisect.h"
#include "flow/classify.h"

/* A call has at most so many times the items of one that succeeded. */
#define GROWTH 8

/* A call has so many items times one over the rate of failures. */
#define GROUP 0.35

/*
 * Averages decay over about so many items: the failure rate, for bursts and for
 * failures that are rare, and the time that an item takes.
 */
#define RECENT_WINDOW 50
#define RATE_WINDOW 2000
#define PACE_WINDOW 5000

/*
 * Return how many items the next call of a set handler gets.
 *
 * As many as take one commit interval, or half the time that one item may take;
 * fewer when items fail, or when the function has subtransactions of its own.  Half
 * of those that are known to fail together.
 */
int
redrive_call_length(RedriveChunk *chunk, RedriveInterval *interval)
{
	const RedrivePace *pace = &chunk->pace;
	double		target_us = chunk->handler.commit_interval;
	double		length = Max(pace->length * GROWTH, 1);

	if (chunk->fails_to > interval->end)
		return Max((chunk->fails_to - interval->end) / 2, 1);
	if (chunk->handler.item_timeout > 0)
		target_us = Min(target_us, chunk->handler.item_timeout / 2.0);
	if (pace->us > 0)
		length = Min(length, target_us * pace->items / pace->us);
	if (pace->subxacts > 0)
		length = Min(length, (MAX_LIVE_SUBXACTS - redrive_live_subxacts()) / pace->subxacts);
	if (pace->rate > 0)
		length = Min(length, GROUP / Max(pace->rate, pace->recent_rate));
	return (int) Max(Min(length, MAX_INTERVAL_ITEMS), 1);
}

/* Learn how long a call of n items took, or at least. */
static void
learn_time(RedrivePace *pace, int n, int64 us)
{
	pace->items += n;
	pace->us += us;
	if (pace->items > PACE_WINDOW)
	{
		pace->items /= 2;
		pace->us /= 2;
	}
}

/* Learn that n items did not make their call fail. */
static void
learn_good(RedrivePace *pace, int n)
{
	pace->recent_rate *= pow(1 - 1.0 / RECENT_WINDOW, n);
	if (pace->seen + n <= RATE_WINDOW)
		pace->rate *= pace->seen / (pace->seen + n);
	else
		pace->rate *= pow(1 - 1.0 / RATE_WINDOW, n);
	pace->seen = Min(pace->seen + n, RATE_WINDOW);
}

/* Learn that an item made its call fail. */
static void
learn_bad(RedrivePace *pace)
{
	pace->recent_rate += (1 - pace->recent_rate) / RECENT_WINDOW;
	pace->seen = Min(pace->seen + 1, RATE_WINDOW);
	pace->rate += (1 - pace->rate) / pace->seen;
}

/* Give the items of a call that succeeded the outcomes that it returned. */
static void
take_outcomes(RedriveCall *call, RedriveChunk *chunk, RedriveInterval *interval, RedriveSlot *slot)
{
	MemoryContext old_cxt = MemoryContextSwitchTo(interval->cxt);

	for (int i = 0; i < call->n_outcomes; i++)
	{
		RedriveOutcome *outcome = &call->outcomes[i];
		RedriveItem *item = &chunk->page[outcome->index];

		item->failure = redrive_judge_outcome(chunk, item, outcome);
		if (item->failure != NULL)
		{
			slot->open_succeeded--;
			slot->open_failed++;
		}
	}
	MemoryContextSwitchTo(old_cxt);
}

/*
 * Call a set handler with the items from interval->end up to the page index "to".
 *
 * interval->end moves on if they are settled.  Otherwise chunk->fails_to tells
 * redrive_call_length() to halve them, or interval->stop is set.
 */
void
redrive_run_set(RedriveCall *call, RedriveChunk *chunk, RedriveInterval *interval, RedriveSlot *slot, int to)
{
	RedrivePace *pace = &chunk->pace;
	const int	first = interval->end;
	const int	n = to - first;
	const int	subxacts = redrive_live_subxacts() + 1;
	const TimestampTz started_at = GetCurrentTimestamp();
	SegmentResult result;
	int64		us;

	redrive_run_segment(call, interval, first, to, &result);
	us = GetCurrentTimestamp() - started_at;
	if (result.error == NULL)
	{
		pace->length = Max(pace->length, n);
		pace->subxacts = Max((redrive_live_subxacts() - subxacts) / (double) n, pace->subxacts * 0.9);
		learn_time(pace, n, us);
		learn_good(pace, n);
		take_outcomes(call, chunk, interval, slot);
		interval->end = to;
		return;
	}
	if (result.handler_gone || result.bad_outcome)
	{
		/* no item's fault: given back, and without an outcome yet */
		interval->stop = true;
		chunk->handler_gone = result.handler_gone;
		if (!result.handler_gone)
			interval->pause_reason = MemoryContextStrdup(chunk->cxt, result.error->message);
		return;
	}
	if (n > 1)
	{
		/* it may have been cut off for taking too long */
		if (us * pace->items > n * pace->us)
			learn_time(pace, n, us);
		chunk->fails_to = to;
		/* others may wait for what this transaction has locked */
		if (redrive_is_transient(chunk, result.error))
			interval->stop = true;
		return;
	}
	learn_bad(pace);
	if (!redrive_settle_failure(chunk, interval, slot, first, result.error) || interval->pause_reason != NULL)
		interval->stop = true;
	if (chunk->page[first].failure != NULL)
	{
		interval->end = to;
		chunk->fails_to = 0;
	}
	else
		chunk->fails_to = to;	/* transient: alone again */
}
