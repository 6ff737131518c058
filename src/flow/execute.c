/*-------------------------------------------------------------------------
 *
 * execute.c
 *	  The engine: run what is due for a role.
 *
 * Chunk, commit interval, segment: why there are three scopes is told in
 * docs/architecture.md.  A segment that fails is rolled back, its failing item
 * set aside, the items before it replayed; how long a segment is follows from
 * the rate of failures.  Runs the same in an executor and in a session that
 * calls redrive.work().
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <math.h>

#include "access/xact.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/crumbs.h"
#include "base/guc.h"
#include "base/wake.h"
#include "base/xact.h"
#include "flow/bisect.h"
#include "flow/build.h"
#include "flow/callback.h"
#include "flow/claim.h"
#include "flow/classify.h"
#include "flow/deferred.h"
#include "flow/execute.h"
#include "flow/fetch.h"
#include "flow/record.h"
#include "flow/segment.h"
#include "flow/suspect.h"

#define MAX_SEGMENT 250

/* A failure rate decays over about so many items. */
#define RATE_WINDOW 50

/* A chunk that takes longer than this is given back for others to share. */
#define MAX_CHUNK_US INT64CONST(4000000)

/* Callbacks come before any chunk, but after so much time with them chunks have a turn. */
#define MAX_CALLBACKS_US INT64CONST(1000000)

/*
 * Return how many items the next segment gets: long enough to be cheap, short
 * enough that a failure wastes little.
 */
static int
segment_length(double failure_rate)
{
	double		length = 1.2 / sqrt(Max(failure_rate, 1e-9));

	return length > MAX_SEGMENT ? MAX_SEGMENT : length < 1 ? 1 : (int) length;
}

/* Is it time to commit? */
static bool
interval_full(RedriveChunk *chunk, RedriveInterval *interval)
{
	int			items = interval->end - interval->first;

	return interval->stop ||
		items >= MAX_INTERVAL_ITEMS ||
		redrive_live_subxacts() >= MAX_LIVE_SUBXACTS ||
		(items > 0 && (chunk->handler.one_by_one || (chunk->commit_each && interval->end <= chunk->alone_to))) ||
		redrive_stop_requested() ||
		(items > 0 && GetCurrentTimestamp() - interval->started_at >= chunk->handler.commit_interval);
}

/*
 * Run the items from interval->end up to "to" and settle at least one of them:
 * interval->end moves on, and to where tells how far.
 */
static void
run_range(RedriveCall *call, RedriveChunk *chunk, RedriveInterval *interval, RedriveSlot *slot, int to)
{
	int			resume = -1;	/* after this failed item once those before it
								 * are replayed */

	while (interval->end < to)
	{
		SegmentResult result;

		interval->replay = resume >= 0;
		redrive_run_segment(call, interval, interval->end, to, &result);
		if (result.error == NULL)
		{
			chunk->failure_rate *= pow(1.0 - 1.0 / RATE_WINDOW, result.reached - interval->end);
			interval->end = result.reached;
			/* a stop may come in a replay: then the failed item is next */
			if (resume >= 0 && interval->end == resume)
				interval->end = resume + 1;
			return;
		}
		if (result.handler_gone)
		{
			/*
			 * given back: the next claim takes the one of that name, or
			 * pauses
			 */
			interval->stop = chunk->handler_gone = true;
			return;
		}
		if (result.failed < 0 && to - interval->end > 1)
		{
			/* a deferred constraint, of an unknown item: one by one from here */
			chunk->alone_to = Max(chunk->alone_to, to);
			return;
		}
		if (result.failed < 0)
			result.failed = interval->end;
		chunk->failure_rate += (1 - chunk->failure_rate) / RATE_WINDOW;
		if (!redrive_settle_failure(chunk, interval, slot, result.failed, result.error) || interval->pause_reason != NULL)
			interval->stop = true;
		to = result.failed;
		resume = chunk->page[result.failed].failure != NULL ? result.failed : -1;
	}
	if (resume == interval->end)
		interval->end = resume + 1;
}

/* Settle the next item, unless it may be run once more. */
static bool
quarantine(RedriveChunk *chunk, RedriveInterval *interval, RedriveSlot *slot)
{
	RedriveItem *item = &chunk->page[interval->end];
	MemoryContext old_cxt;

	if (item->crash_count < MAX_CRASHES)
		return false;
	old_cxt = MemoryContextSwitchTo(interval->cxt);
	item->failure = redrive_quarantine(item);
	MemoryContextSwitchTo(old_cxt);
	slot->open_failed++;
	interval->end++;
	return true;
}

/* Run one commit interval of the page; nothing is recorded yet. */
static void
run_interval(RedriveCall *call, RedriveChunk *chunk, RedriveInterval *interval, RedriveSlot *slot)
{
	while (interval->end < chunk->page_items && !interval_full(chunk, interval))
	{
		const bool	set = chunk->handler.signature == SIGNATURE_ITEMS;
		int			suspect = redrive_next_suspect(chunk, interval->end);
		int			length;

		if (chunk->handler.one_by_one)
			length = 1;
		else if (set)
			length = redrive_call_length(chunk, interval);
		else
			length = interval->end < chunk->alone_to ? 1 : segment_length(chunk->failure_rate);

		if (suspect == interval->end)
		{
			if (quarantine(chunk, interval, slot))
				continue;
			if (interval->end > interval->first)
				break;			/* commit what was before it */
			interval->stop = true;
			length = 1;
			suspect++;
		}
		/* the suspects of an interval are limited in number */
		length = Min(length, MAX_INTERVAL_ITEMS - (interval->end - interval->first));
		if (set)
			redrive_run_set(call, chunk, interval, slot, Min(interval->end + length, suspect));
		else
			run_range(call, chunk, interval, slot, Min(interval->end + length, suspect));
		if (redrive_commit_after_segment())
			interval->stop = true;
	}
	/* what failed behind the end is not settled: it runs again */
	for (int i = interval->end; i < chunk->page_items && i < interval->end + MAX_SEGMENT + 1; i++)
		chunk->page[i].failure = NULL;
}

/*
 * Record and commit an interval.
 *
 * Returns false when the chunk shall not go on: the batch was paused or
 * cancelled.  An error at commit (a deferred trigger, a serialization failure)
 * makes the interval run again, one item per transaction; a single item that
 * cannot be committed fails with that error.
 */
static bool
commit_interval(RedriveChunk *chunk, RedriveInterval *interval, RedriveSlot *slot)
{
	MemoryContext old_cxt = CurrentMemoryContext;
	bool		ends_chunk = chunk->page_items > 0 && interval->end == chunk->page_items &&
	chunk->page[chunk->page_items - 1].item_no >= chunk->to_no;
	const int	subxacts = redrive_live_subxacts();
	volatile bool live = true;
	ErrorData  *volatile error = NULL;

	PG_TRY();
	{
		MemoryContextSwitchTo(interval->cxt);
		live = redrive_record(chunk, interval, ends_chunk);
		MemoryContextSwitchTo(old_cxt);

		/*
		 * An interval that ends early for want of subtransactions need not
		 * wait for the disk: a crash would lose effects and books alike, and
		 * the items run again.  The last interval of a chunk always waits.
		 */
		if (subxacts >= MAX_LIVE_SUBXACTS && !ends_chunk && !chunk->handler.one_by_one)
			redrive_commit_lazily();
		else
			redrive_commit();
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(interval->cxt);
		error = CopyErrorData();
		FlushErrorState();
		MemoryContextSwitchTo(old_cxt);
		redrive_rollback();
	}
	PG_END_TRY();
	slot->open_succeeded = slot->open_failed = 0;

	if (error == NULL)
	{
		redrive_reconnect();
		chunk->done += interval->end - interval->first;
		if (interval->end > interval->first)
			chunk->done_to = chunk->page[interval->end - 1].item_no;
		chunk->page_next = interval->end;
		chunk->ended = ends_chunk;
		return live;
	}
	if (error->sqlerrcode == ERRCODE_REDRIVE_FENCED || error->sqlerrcode == ERRCODE_QUERY_CANCELED)
		ReThrowError(error);

	for (int i = interval->first; i < interval->end; i++)
		chunk->page[i].failure = NULL;
	if (interval->end - interval->first <= 1)
	{
		if (chunk->commit_failed)
			ReThrowError(error);	/* not even the failure can be recorded */
		chunk->commit_failed = true;
		interval->pause_reason = NULL;
		if (interval->end > interval->first)
		{
			if (!redrive_settle_failure(chunk, interval, slot, interval->first, error))
				return true;	/* transient: at once again */
			return commit_interval(chunk, interval, slot);
		}
		ReThrowError(error);
	}
	chunk->alone_to = Max(chunk->alone_to, interval->end);
	chunk->fails_to = interval->end;
	chunk->commit_each = true;
	return true;
}

/* Run a claimed chunk to its end, or until it has to be given back. */
static void
run_chunk(RedriveChunk *chunk, RedriveSlot *slot, TimestampTz deadline)
{
	RedriveCall *call = redrive_prepare_call(chunk, slot);
	MemoryContext interval_cxt = AllocSetContextCreate(chunk->cxt, "redrive interval", ALLOCSET_DEFAULT_SIZES);
	static int32 last_handler_id = 0;
	static double last_failure_rate = 0;
	static RedrivePace last_pace;
	bool		go_on = true;

	chunk->started = true;
	/* what the same handler did a moment ago is the best guess */
	if (last_handler_id == chunk->handler.handler_id)
	{
		chunk->failure_rate = last_failure_rate;
		chunk->pace = last_pace;
	}

	while (go_on && !chunk->ended)
	{
		RedriveInterval interval = {0};
		TimestampTz now;

		MemoryContextReset(interval_cxt);
		if (chunk->page_next == chunk->page_items)
		{
			chunk->alone_to = chunk->fails_to = 0;
			chunk->commit_each = false;
			if (!redrive_fetch_page(chunk))
				interval.pause_reason = psprintf("items after %lld are missing", (long long) chunk->done_to);
		}
		interval.cxt = interval_cxt;
		interval.started_at = GetCurrentTimestamp();
		interval.first = interval.end = chunk->page_next;
		run_interval(call, chunk, &interval, slot);
		chunk->commit_failed = false;
		go_on = commit_interval(chunk, &interval, slot);

		now = GetCurrentTimestamp();
		if (now > chunk->claimed_at)
			slot->items_per_second = chunk->done * 1e6 / (now - chunk->claimed_at);
		if (chunk->handler_gone || redrive_stop_requested() || !redrive_enabled || (deadline != 0 && now >= deadline) ||
			now - chunk->claimed_at > MAX_CHUNK_US)
			go_on = false;
		CHECK_FOR_INTERRUPTS();
	}
	last_handler_id = chunk->handler.handler_id;
	last_failure_rate = chunk->failure_rate;
	last_pace = chunk->pace;
}

/* Show in the slot, and in pg_stat_activity, what this worker is doing. */
static void
show_chunk(RedriveSlot *slot, RedriveChunk *chunk)
{
	char		activity[512];	/* a name of 100 characters fits */

	slot->handler_id = chunk->handler.handler_id;
	slot->batch_id = chunk->batch_id;
	slot->chunk_id = chunk->chunk_id;
	redrive_crumb->batch_id = chunk->batch_id;
	redrive_crumb->lease_token = chunk->lease_token;
	redrive_crumb->chunk_id = chunk->chunk_id;
	slot->claimed_at = chunk->claimed_at;
	slot->items_per_second = 0;
	slot->open_succeeded = slot->open_failed = 0;
	slot->state = SLOT_RUNNING;
	if (!slot->foreground)
	{
		snprintf(activity, sizeof(activity), "redrive: handler %s, batch %lld, chunk %lld",
				 chunk->handler.name, (long long) chunk->batch_id, (long long) chunk->chunk_id);
		pgstat_report_activity(STATE_RUNNING, activity);
	}
}

static void
show_nothing(RedriveSlot *slot)
{
	slot->state = SLOT_CLAIMING;
	slot->handler_id = 0;
	slot->batch_id = slot->chunk_id = 0;
	redrive_crumb->chunk_id = 0;
	slot->item_no = 0;
	slot->open_succeeded = slot->open_failed = 0;
}

/*
 * The handler cannot be called at all: its function or its owner is gone, or may
 * not execute it.  No item's fault: the batch is paused and says why.
 */
static void
pause_for_defect(RedriveChunk *chunk, ErrorData *error)
{
	RedriveInterval interval = {0};

	interval.pause_reason = psprintf("handler \"%s\" cannot run: %s", chunk->handler.name, error->message);
	(void) redrive_record(chunk, &interval, false);
	redrive_commit();
	redrive_give_back(chunk, false);
}

/* Run a claimed chunk; on an error give it back before throwing on. */
static void
run_or_give_back(RedriveChunk *chunk, RedriveSlot *slot, TimestampTz deadline)
{
	MemoryContext old_cxt = CurrentMemoryContext;

	PG_TRY();
	{
		run_chunk(chunk, slot, deadline);
		if (chunk->ended)
		{
			redrive_fold(chunk);
			redrive_count_rule_hits(chunk);
			redrive_commit_lazily();
		}
		else
			redrive_give_back(chunk, false);
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(chunk->cxt);
		error = CopyErrorData();
		FlushErrorState();
		MemoryContextSwitchTo(old_cxt);
		redrive_rollback();
		show_nothing(slot);
		if (error->sqlerrcode == ERRCODE_REDRIVE_FENCED)
			ereport(LOG, (errmsg("%s", error->message), errdetail("%s", error->detail)));
		else if (!chunk->started && (error->sqlerrcode == ERRCODE_UNDEFINED_FUNCTION ||
									 error->sqlerrcode == ERRCODE_UNDEFINED_SCHEMA ||
									 error->sqlerrcode == ERRCODE_UNDEFINED_OBJECT ||
									 error->sqlerrcode == ERRCODE_INSUFFICIENT_PRIVILEGE ||
									 error->sqlerrcode == ERRCODE_WRONG_OBJECT_TYPE))
			pause_for_defect(chunk, error);
		else
		{
			/* counted like a lost worker, so that it ends in a pause */
			redrive_give_back(chunk, error->sqlerrcode != ERRCODE_QUERY_CANCELED);
			ReThrowError(error);
		}
	}
	PG_END_TRY();
}

/*
 * Claim one chunk for the handlers of a role and run it, or run its callbacks.
 *
 * Needs a non-atomic connection with nothing to lose in the transaction that
 * is open; another one is open afterwards.  Resets cxt, which holds everything
 * of the turn, and the connection: afterwards CurrentMemoryContext is that of
 * the new one.
 */
RedriveTurn
redrive_execute_next(RedriveSlot *slot, Oid owner, MemoryContext cxt, TimestampTz deadline)
{
	int64		hint = slot->hint;
	bool		worked = false;
	bool		more = false;
	static TimestampTz callbacks_since = 0; /* no chunk since then, 0 = the
											 * last turn was a chunk's */
	const bool	chunk_first = callbacks_since != 0 && GetCurrentTimestamp() - callbacks_since > MAX_CALLBACKS_US;
	bool		callbacks = !chunk_first;
	RedriveChunk *chunk;

	redrive_arm_stop();
	MemoryContextSwitchTo(cxt);
	slot->hint = 0;
	chunk = redrive_claim(owner, hint, cxt, &more, &callbacks);
	if (callbacks || (chunk_first && chunk == NULL))
	{
		TimestampTz now = GetCurrentTimestamp();

		worked = redrive_run_due_callbacks(slot, owner) || redrive_run_due_builds(slot, owner);
		if (callbacks_since == 0 || chunk_first)
			callbacks_since = now;
		/* another worker has taken them: look for something else */
		if (!worked && callbacks)
		{
			callbacks = false;
			chunk = redrive_claim(owner, 0, cxt, &more, &callbacks);
		}
	}
	if (chunk != NULL || !worked)
		callbacks_since = 0;
	if (chunk != NULL)
	{
		worked = true;
		/* woken for another batch while we took this one: pass it on */
		if (slot->state == SLOT_CLAIMING && !slot->foreground)
			more = true;
		show_chunk(slot, chunk);
		/* only now: before, our own slot might be the idle one it finds */
		if (more)
			redrive_wake_now(owner, false, 0);
		run_or_give_back(chunk, slot, deadline);
		show_nothing(slot);
	}
	redrive_disarm_stop();
	redrive_disconnect();
	redrive_connect_nonatomic();
	MemoryContextReset(cxt);
	return worked ? TURN_WORKED : more ? TURN_LOCKED : TURN_IDLE;
}
