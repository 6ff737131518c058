/*-------------------------------------------------------------------------
 *
 * push_held.c
 *	  Results of pushes: those to be recorded, and those that somebody has locked.
 *
 * An application that records a new status of a task keeps the task's pushes
 * locked until its transaction ends.  Who waited for that would hold up all
 * pushes of the database.  So such results are held, and recorded when the lock
 * is gone.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/spi_call.h"
#include "base/xact.h"
#include "flow/push.h"

#define LOCK_TIMEOUT "100ms"	/* then we look which pushes are locked */
#define HELD_MS 200				/* time to the next try */

#define FLUSH_RESULTS 256		/* record when there are so many */
#define FLUSH_US 10000			/* or the oldest has waited so long */
#define FLUSH_HALF_US 4000		/* or so long, and half of a platform's have
								 * ended */

static Push *results = NULL;	/* to be recorded, the oldest first */
static Push **last_result = &results;
static int	n_results = 0;
static TimestampTz first_result_at;
static bool half_ended = false; /* of what a platform had under way */
static bool all_ended = false;	/* of it */
static Push *held = NULL;
static TimestampTz held_until = DT_NOEND;

static void
append_result(Push *push)
{
	if (n_results++ == 0)
		first_result_at = GetCurrentTimestamp();
	push->next = NULL;
	*last_result = push;
	last_result = &push->next;
}

/*
 * A push has ended and is to be recorded.
 *
 * Those of each platform are counted: it need not wait for what others have under
 * way.
 */
void
redrive_add_result(Push *push)
{
	Platform   *p = push->platform;

	append_result(push);
	p->in_flight--;
	p->ended++;
	half_ended |= p->n_prefetched == 0 && p->ended >= p->in_flight;
	all_ended |= p->n_prefetched == 0 && p->in_flight == 0;
}

/* When to record what there is; DT_NOEND = there is nothing. */
TimestampTz
redrive_results_due(TimestampTz now)
{
	if (n_results == 0)
		return DT_NOEND;
	if (n_results >= FLUSH_RESULTS || all_ended)
		return now;
	return first_result_at + (half_ended ? FLUSH_HALF_US : FLUSH_US);
}

/* Return what is to be recorded, in the current context. */
Push **
redrive_results(int *n)
{
	Push	  **pushes = palloc(Max(n_results, 1) * sizeof(Push *));

	*n = 0;
	for (Push *push = results; push != NULL; push = push->next)
		pushes[(*n)++] = push;
	return pushes;
}

/* All of it has been recorded, or is held. */
void
redrive_clear_results(List *platforms)
{
	ListCell   *lc;

	results = NULL;
	last_result = &results;
	n_results = 0;
	half_ended = false;
	all_ended = false;
	foreach(lc, platforms)
		((Platform *) lfirst(lc))->ended = 0;
}

/* Lock those that are free; return the others, if they are still ours. */
static RedriveSql locked_pushes = {
	.lookups = true,
	.text =
	"WITH free AS MATERIALIZED (SELECT n.place FROM unnest($1) WITH ORDINALITY AS n (push_id, place)"
	" CROSS JOIN LATERAL (SELECT FROM redrive.pushes AS x WHERE x.push_id = n.push_id FOR NO KEY UPDATE SKIP LOCKED) AS u)"
	" SELECT n.place FROM unnest($1, $2) WITH ORDINALITY AS n (push_id, claim_id, place)"
	" WHERE NOT EXISTS (SELECT FROM free AS f WHERE f.place = n.place)"
	" AND EXISTS (SELECT FROM redrive.pushes AS x WHERE x.push_id = n.push_id AND x.last_claim_id < n.claim_id)",
	.nargs = 2,.argtypes = {INT8ARRAYOID, INT8ARRAYOID}
};

/* Put the pushes that others have locked last; return how many are not. */
int
redrive_put_locked_last(Push **pushes, int n)
{
	Datum	   *ids = palloc(n * sizeof(Datum));
	Datum	   *claims = palloc(n * sizeof(Datum));
	Push	  **locked = palloc(n * sizeof(Push *));
	Datum		values[2];
	uint64		n_locked;
	int			n_free = 0;

	for (int i = 0; i < n; i++)
	{
		ids[i] = Int64GetDatum(pushes[i]->push_id);
		claims[i] = Int64GetDatum(pushes[i]->claim->claim_id);
	}
	values[0] = redrive_array(INT8OID, n, ids, NULL);
	values[1] = redrive_array(INT8OID, n, claims, NULL);
	n_locked = redrive_sql(&locked_pushes, values, NULL);
	for (uint64 row = 0; row < n_locked; row++)
	{
		int			place = (int) redrive_int64(row, "place") - 1;

		locked[row] = pushes[place];
		pushes[place] = NULL;
	}
	for (int i = 0; i < n; i++)
		if (pushes[i] != NULL)
			pushes[n_free++] = pushes[i];
	for (uint64 row = 0; row < n_locked; row++)
		pushes[n_free + row] = locked[row];
	redrive_free_rows();
	return n_free;
}

static char *
copy_text(const char *text)
{
	return text != NULL ? pstrdup(text) : NULL;
}

/* Hold a result, with its texts, in cxt. */
void
redrive_hold_push(Push *push, MemoryContext cxt)
{
	if (push->texts == NULL)
	{
		MemoryContext old_cxt;

		push->texts = AllocSetContextCreate(cxt, "redrive held push", ALLOCSET_SMALL_SIZES);
		old_cxt = MemoryContextSwitchTo(push->texts);
		push->message = copy_text(push->message);
		push->response = copy_text(push->response);
		MemoryContextSwitchTo(old_cxt);
	}
	if (held == NULL)
		held_until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), HELD_MS);
	push->next = held;
	held = push;
}

/* Wait for a lock of somebody else only for a moment, to the end of the transaction. */
void
redrive_limit_lock_wait(void)
{
	(void) set_config_option("lock_timeout", LOCK_TIMEOUT, PGC_SUSET, PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0, false);
}

/* Is it an error of the server, and not of what is recorded? */
bool
redrive_is_outage(int sqlstate)
{
	switch (ERRCODE_TO_CATEGORY(sqlstate))
	{
		case ERRCODE_INSUFFICIENT_RESOURCES:
		case ERRCODE_SYSTEM_ERROR:
		case ERRCODE_CONNECTION_EXCEPTION:
		case ERRCODE_TRANSACTION_ROLLBACK:
			return true;
		default:
			return false;
	}
}

/*
 * Record so many results and forget them, each part in a transaction of its own: when
 * one cannot be recorded, half of them at a time, to find the culprit, and that without
 * its answer.  What is locked, or cannot be recorded at all for now, is held in cxt.
 */
void
redrive_record_apart(Push **pushes, int n, bool without_answers, MemoryContext cxt)
{
	MemoryContext old_cxt = CurrentMemoryContext;
	volatile int sqlstate = 0;

	PG_TRY();
	{
		redrive_worker_begin();
		redrive_limit_lock_wait();
		redrive_record_pushes(pushes, n, without_answers);
		redrive_worker_end();
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(old_cxt);
		if (ProcDiePending)
			PG_RE_THROW();
		sqlstate = geterrcode();
		if (sqlstate != ERRCODE_LOCK_NOT_AVAILABLE && (without_answers || redrive_is_outage(sqlstate)))
			EmitErrorReport();
		FlushErrorState();
		redrive_worker_abort();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(old_cxt);
	if (sqlstate == 0)
		redrive_forget_pushes(pushes, n);
	else if (redrive_is_outage(sqlstate) || (n == 1 && (without_answers || sqlstate == ERRCODE_LOCK_NOT_AVAILABLE)))
	{
		for (int i = 0; i < n; i++)
			redrive_hold_push(pushes[i], cxt);
	}
	else if (n > 1)
	{
		redrive_record_apart(pushes, n / 2, without_answers, cxt);
		redrive_record_apart(pushes + n / 2, n - n / 2, without_answers, cxt);
	}
	else
		redrive_record_apart(pushes, n, true, cxt);
}

/* Until when results are held; DT_NOEND = there are none. */
TimestampTz
redrive_held_until(void)
{
	return held_until;
}

/* Try to record again what was held. */
void
redrive_take_held(void)
{
	while (held != NULL)
	{
		Push	   *push = held;

		held = push->next;
		append_result(push);
	}
	held_until = DT_NOEND;
}
