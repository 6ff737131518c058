/*-------------------------------------------------------------------------
 *
 * lease.c
 *	  Claims of external workers, and the wait for something to claim.
 *
 * A claim is part of the caller's transaction and seen by others when that
 * commits.  Whoever waits sleeps in a statement of the caller, with the
 * snapshot of it; each look has a new one.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "storage/latch.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/compat.h"
#include "base/guc.h"
#include "base/shmem.h"
#include "base/spi_call.h"
#include "base/wake.h"
#include "base/xact.h"
#include "flow/fetch.h"

/* Nobody waits longer: his snapshot keeps vacuum from its work. */
#define MAX_WAIT_MS 60000

/* A lock on what there is may go without a word. */
#define BUSY_MS 50

/* How long claims are taken from a lot without a look at what else there is. */
#define LOT_MS 100

/* How often we look when nobody can tell us. */
#define LOOK_MS 200

/* How often, lest a word be lost: as the supervisor (proc/supervisor.c). */
#define TICK_MS 30000

/* Below 2^53, that of JavaScript's numbers which are exact. */
#define TOKEN_BITS 52

PG_FUNCTION_INFO_V1(redrive_claim_external);
PG_FUNCTION_INFO_V1(redrive__lease_token);

static RedriveSql claim = {
	.lookups = true,
	.text = "SELECT * FROM redrive._claim_external($1, $2, $3, $4, $5)",
	.nargs = 5,.argtypes = {OIDOID, TEXTOID, INT4OID, INTERVALOID, TEXTOID}
};

/*
 * A claim from a lot that was set aside (redrive._take_work): what the above would
 * do, in one statement and with no lock but that of the lot.
 */
static RedriveSql claim_from_lot = {
	"WITH l AS MATERIALIZED ("
	"  SELECT c.*, h.owner FROM redrive.chunks AS c"
	"  JOIN redrive.handlers AS h ON h.handler_id = c.handler_id JOIN redrive.batches AS b ON b.batch_id = c.batch_id"
	"  WHERE c.chunk_id = $6 AND c.state = 'orphaned' AND c.kind = 'first' AND c.done = 0 AND c.rescue_count = 0"
	"  AND c.items > $3 AND $3 BETWEEN 1 AND 10000 AND $4 BETWEEN interval '1 ms' AND interval '30 days' AND b.state = 'running'"
	"  AND h.name = $2 AND h.kind = 'external' AND NOT h.paused AND h.max_workers IS NULL AND h.tolerated_failures IS NULL"
	"  AND pg_has_role($1, h.owner::oid, 'USAGE')"
	"  FOR UPDATE OF c SKIP LOCKED),"
	" u AS (UPDATE redrive.chunks AS c SET from_no = c.from_no + $3, done_to = c.done_to + $3, items = c.items - $3"
	"  FROM l WHERE c.chunk_id = l.chunk_id),"
	" x AS (INSERT INTO redrive.chunks (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items,"
	"   lease_token, claimed_at, progress_at, worker, lease, lease_until)"
	"  SELECT l.batch_id, l.handler_id, l.part, l.run_no, 'first', 'running', l.from_no, l.done_to + $3, l.done_to, $3,"
	"   redrive._lease_token(), $7, $7, $5, $4, $7 + $4 FROM l"
	"  RETURNING chunk_id, lease_token, lease_until, batch_id, part, done_to, to_no)"
	" SELECT x.chunk_id, x.lease_token, x.lease_until, x.batch_id, x.part, false AS retry, x.done_to, x.to_no, NULL::bigint[] AS settled,"
	" l.owner::oid AS owner FROM x CROSS JOIN l",
	7, {OIDOID, TEXTOID, INT4OID, INTERVALOID, TEXTOID, INT8OID, TIMESTAMPTZOID}
};

static RedriveSql next_due = {
	"SELECT (extract(epoch FROM redrive._next_due($1) - $1) * 1000)::bigint AS ms",
	1, {TIMESTAMPTZOID}
};

/*
 * The lot of our last claim, and until when the next ones are taken from it
 * without asking whether something else comes before it.
 */
static int64 lot = 0;			/* 0 = none */
static TimestampTz lot_until = 0;

/* What a claim found. */
typedef struct Claim
{
	RedriveChunk chunk;
	TimestampTz lease_until;
	Datum	   *settled;		/* items that are done already, in order */
	int			n_settled;
} Claim;

/* Read the argument wait in milliseconds, at most MAX_WAIT_MS. */
static int64
wait_argument(FunctionCallInfo fcinfo, int arg)
{
	TimestampTz now = GetCurrentTimestamp();
	Interval	longest = {.time = MAX_WAIT_MS * INT64CONST(1000)};
	Interval	none = {0};

	if (PG_ARGISNULL(arg))
		return 0;
	if (DatumGetBool(DirectFunctionCall2(interval_lt, PG_GETARG_DATUM(arg), IntervalPGetDatum(&none))))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("wait must not be negative"),
				 errhint("Leave it out not to wait.")));
	if (DatumGetBool(DirectFunctionCall2(interval_ge, PG_GETARG_DATUM(arg), IntervalPGetDatum(&longest))))
		return MAX_WAIT_MS;
	return (DatumGetTimestampTz(DirectFunctionCall2(timestamptz_pl_interval, TimestampTzGetDatum(now),
													PG_GETARG_DATUM(arg))) - now) / 1000;
}

/*
 * Sleep until something may have become claimable, at most ms; not at all if
 * somebody said so since woken was read, before the last look.  A client that
 * has gone meanwhile shall not get anything.
 */
static void
sleep_for_work(Oid owner, uint64 *woken, long ms, uint32 wait_event)
{
	if (redrive_shared != NULL)
	{
		RedriveClaimers *claimers = redrive_claimers(owner);

		ConditionVariablePrepareToSleep(&claimers->sleepers);
		if (pg_atomic_read_u64(&claimers->woken) == *woken)
			(void) ConditionVariableTimedSleep(&claimers->sleepers, ms, wait_event);
		*woken = pg_atomic_read_u64(&claimers->woken);
	}
	else
	{
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, Min(ms, LOOK_MS), wait_event);
		ResetLatch(MyLatch);
	}
	CHECK_FOR_INTERRUPTS();
	if (MyProcPort != NULL && !pq_check_connection())
		ereport(ERROR,
				(errcode(ERRCODE_CONNECTION_FAILURE),
				 errmsg("the client that waited for work has gone")));
}

/* How long until something of the database becomes due by itself, at most ms. */
static int64
until_due(int64 ms)
{
	Datum		values[1] = {TimestampTzGetDatum(GetCurrentTimestamp())};
	bool		isnull;
	int64		due;

	redrive_sql_one_row(&next_due, values, NULL);
	due = redrive_int64(0, "ms");
	(void) redrive_column(0, "ms", &isnull);
	return isnull ? ms : Min(ms, due + 1);
}

/* Take the claim out of the row of an attempt. */
static void
read_claim(Claim *found)
{
	RedriveChunk *chunk = &found->chunk;
	Datum		settled;
	bool		isnull;

	chunk->cxt = CurrentMemoryContext;
	chunk->page_cxt = AllocSetContextCreate(CurrentMemoryContext, "redrive page", ALLOCSET_DEFAULT_SIZES);
	chunk->chunk_id = redrive_int64(0, "chunk_id");
	chunk->batch_id = redrive_int64(0, "batch_id");
	chunk->lease_token = redrive_int64(0, "lease_token");
	chunk->part = DatumGetInt16(redrive_column(0, "part", &isnull));
	chunk->retry = redrive_bool(0, "retry");
	chunk->done_to = redrive_int64(0, "done_to");
	chunk->to_no = redrive_int64(0, "to_no");
	found->lease_until = redrive_time(0, "lease_until");
	settled = redrive_column(0, "settled", &isnull);
	if (!isnull)
		deconstruct_array(DatumGetArrayTypePCopy(settled), INT8OID, sizeof(int64), FLOAT8PASSBYVAL, TYPALIGN_DOUBLE,
						  &found->settled, NULL, &found->n_settled);
}

/* Claim from the lot of the last claim, if that was a moment ago; false = search. */
static bool
claim_more(Datum *values, char *nulls, Claim *found)
{
	TimestampTz now = GetCurrentTimestamp();
	bool		isnull;

	if (lot == 0 || now >= lot_until || !redrive_enabled)
		return false;
	values[5] = Int64GetDatum(lot);
	values[6] = TimestampTzGetDatum(now);
	if (redrive_sql(&claim_from_lot, values, nulls) == 0)
		return false;
	read_claim(found);
	redrive_wake_supervisor_by(found->lease_until);
	redrive_wake_claimers_at_commit(DatumGetObjectId(redrive_column(0, "owner", &isnull)));
	return true;
}

/*
 * Try to claim until there is something, or the time is over; false = nothing.
 * Never sleeps with a lock, or with something written down that others wait for.
 */
static bool
claim_or_wait(FunctionCallInfo fcinfo, Claim *found)
{
	Datum		values[7];
	char		nulls[] = "       ";
	int64		wait_ms = wait_argument(fcinfo, 4);
	TimestampTz began = GetCurrentTimestamp();
	uint64		woken = PG_UINT64_MAX;	/* not read yet: look once more */
	uint32		wait_event = redrive_wait_event("RedriveClaim");

	if (wait_ms > 0 && IsolationUsesXactSnapshot())
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("cannot wait for work in a transaction with one snapshot"),
				 errdetail("It would not see what is committed meanwhile."),
				 errhint("Claim at isolation level READ COMMITTED.")));
	values[0] = ObjectIdGetDatum(GetUserId());
	for (int i = 0; i < 4; i++)
	{
		values[i + 1] = fcinfo->args[i].value;
		nulls[i + 1] = fcinfo->args[i].isnull ? 'n' : ' ';
	}
	if (claim_more(values, nulls, found))
		return true;
	(void) redrive_version_fits(ERROR);
	for (;;)
	{
		bool		isnull;
		char	   *outcome;
		Oid			owner;
		bool		busy;
		int64		left;

		redrive_sql_one_row(&claim, values, nulls);
		outcome = redrive_text(0, "outcome", CurrentMemoryContext);
		owner = DatumGetObjectId(redrive_column(0, "owner", &isnull));
		busy = strcmp(outcome, "busy") == 0;
		if (strcmp(outcome, "claimed") == 0)
		{
			read_claim(found);
			lot = redrive_int64(0, "lot");
			lot_until = GetCurrentTimestamp() + LOT_MS * INT64CONST(1000);
			if (redrive_bool(0, "more"))
				redrive_wake_claimers_at_commit(owner);
			return true;
		}
		if (strcmp(outcome, "changed") == 0)
		{
			redrive_batch_ended_at_commit();
			return false;
		}
		left = wait_ms - (GetCurrentTimestamp() - began) / 1000;
		if (left <= 0)
			return false;
		redrive_free_rows();
		sleep_for_work(owner, &woken, (long) (busy ? Min(left, BUSY_MS) : until_due(Min(left, TICK_MS))), wait_event);
	}
}

/* SQL: claim(handler, max_items, lease, worker, wait) */
Datum
redrive_claim_external(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	Claim		found = {0};
	RedriveChunk *chunk = &found.chunk;
	int			next_settled = 0;
	bool		claimed;

	InitMaterializedSRF(fcinfo, 0);
	redrive_require_writable(fcinfo);
	redrive_connect();
	claimed = claim_or_wait(fcinfo, &found);
	ConditionVariableCancelSleep();
	while (claimed && chunk->done_to < chunk->to_no)
	{
		if (!redrive_fetch_page(chunk))
			ereport(ERROR,
					(errcode(ERRCODE_DATA_CORRUPTED),
					 errmsg("items after %lld of batch %lld are missing", (long long) chunk->done_to, (long long) chunk->batch_id)));
		for (int i = 0; i < chunk->page_items; i++)
		{
			RedriveItem *item = &chunk->page[i];
			Datum		values[8];
			bool		nulls[8] = {false};

			chunk->done_to = item->item_no;
			if (next_settled < found.n_settled && DatumGetInt64(found.settled[next_settled]) == item->item_no)
			{
				next_settled++;
				continue;
			}
			values[0] = Int64GetDatum(chunk->chunk_id);
			values[1] = Int64GetDatum(chunk->lease_token);
			values[2] = Int64GetDatum(chunk->batch_id);
			values[3] = Int64GetDatum(item->item_no);
			values[4] = PointerGetDatum(item->key);
			nulls[4] = item->key == NULL;
			values[5] = item->payload;
			values[6] = Int32GetDatum(item->attempts + 1);
			values[7] = TimestampTzGetDatum(found.lease_until);
			tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
		}
	}
	redrive_disconnect();
	return (Datum) 0;
}

/* SQL: _lease_token() */
Datum
redrive__lease_token(PG_FUNCTION_ARGS)
{
	uint64		bits;

	if (!pg_strong_random(&bits, sizeof(bits)))
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR),
				 errmsg("could not generate a random lease token")));
	PG_RETURN_INT64((int64) (bits >> (64 - TOKEN_BITS)) + 1);
}
