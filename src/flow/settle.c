/*-------------------------------------------------------------------------
 *
 * settle.c
 *	  What external workers say about the items of their claims.
 *
 * All of it is part of the worker's own transaction: what it wrote there and
 * what is written down here commit together, or not at all.  The claim's row is
 * locked first, and before it that of the batch if an item is to wait: workers
 * of one batch do not meet there otherwise.  Nothing of the batch is counted
 * here; the next claim does that, or the supervisor (proc/external.c).
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/lsyscache.h"
#include "utils/timestamp.h"

#include "base/spi_call.h"
#include "base/wake.h"
#include "base/xact.h"
#include "flow/classify.h"
#include "flow/record.h"

PG_FUNCTION_INFO_V1(redrive_settle);
PG_FUNCTION_INFO_V1(redrive_complete);

/* The type of $1 is known at run time only. */
static RedriveSql read_outcomes = {
	"SELECT u.item_no, u.outcome::text AS outcome, u.message, u.code, u.delay,"
	" (u.delay < interval '0' OR u.delay > interval '100 years') AS wrong_delay"
	" FROM unnest($1) AS u ORDER BY u.item_no",
	1, {InvalidOid}
};

/*
 * Who has a lease is running.  It is not asked by the state: a plan made while few
 * claims were would take the index of those for the way to each.
 *
 * Nearly every claim ends here: all its items succeeded and none has a key.
 */
static RedriveSql complete_all = {
	"UPDATE redrive.chunks AS c SET done_to = c.to_no, settled = NULL, succeeded = c.succeeded + c.items - c.done, done = c.items,"
	" state = 'done', lease_token = NULL, lease_until = NULL, progress_at = clock_timestamp(), finished_at = clock_timestamp()"
	" FROM redrive.batches AS b JOIN redrive.handlers AS h ON h.handler_id = b.handler_id"
	" WHERE c.chunk_id = $1 AND c.lease_token = $2 AND c.lease_until IS NOT NULL"
	" AND b.batch_id = c.batch_id AND NOT b.keyed"
	" RETURNING h.owner::oid AS owner, h.max_workers IS NOT NULL AS limited",
	2, {INT8OID, INT8OID}
};

static RedriveSql lock_batch = {
	"SELECT FROM redrive.batches AS b WHERE b.batch_id = (SELECT c.batch_id FROM redrive.chunks AS c WHERE c.chunk_id = $1)"
	" FOR NO KEY UPDATE",
	1, {INT8OID}
};

static RedriveSql lock_claim = {
	"SELECT c.batch_id, c.part, c.run_no, c.items - c.done AS open, b.keyed, h.owner::oid AS owner,"
	" h.max_workers IS NOT NULL AS limited, h.on_unlock IS NOT NULL AS calls, h.handler_id, h.name, h.max_retries,"
	" coalesce((extract(epoch FROM h.retry_delay) * 1000000)::bigint, -1) AS retry_delay, h.retry_factor,"
	" (extract(epoch FROM h.retry_delay_max) * 1000000)::bigint AS retry_delay_max"
	" FROM redrive.chunks AS c JOIN redrive.batches AS b ON b.batch_id = c.batch_id JOIN redrive.handlers AS h ON h.handler_id = c.handler_id"
	" WHERE c.chunk_id = $1 AND c.lease_token = $2 AND c.lease_until IS NOT NULL"
	" FOR UPDATE OF c",
	2, {INT8OID, INT8OID}
};

static RedriveSql open_items = {
	"SELECT * FROM redrive._open_items($1, $2)",
	2, {INT8OID, INT8ARRAYOID}
};

/* What is before done_to of a retry chunk was split from it. */
static RedriveSql was_in_claim = {
	"SELECT CASE c.kind WHEN 'first' THEN $2 BETWEEN c.from_no AND c.to_no"
	" ELSE $2 > c.done_to AND EXISTS (SELECT FROM redrive.retry_lists AS l WHERE l.chunk_id = c.chunk_id AND $2 = ANY (l.item_nos)) END AS was"
	" FROM redrive.chunks AS c WHERE c.chunk_id = $1",
	2, {INT8OID, INT8OID}
};

static RedriveSql unlock = {
	"SELECT redrive._unlock_settled($1, $2)",
	2, {INT8OID, TEXTARRAYOID}
};

static RedriveSql refuse = {
	"SELECT redrive._refuse_claim($1, $2, $3)",
	3, {OIDOID, INT8OID, INT8OID}
};

/* $7: end it; else $8 are the items. */
static RedriveSql write_down = {
	"WITH m AS ("
	"  SELECT x.kind, x.done_to, x.to_no,"
	"   coalesce(x.settled, '{}') + coalesce((SELECT range_agg(int8range(i, i, '[]')) FROM unnest($8) AS i), '{}') AS settled"
	"  FROM redrive.chunks AS x WHERE x.chunk_id = $1),"
	" p AS (SELECT m.settled, CASE WHEN $7 THEN m.to_no"
	"   WHEN m.kind = 'first' AND lower(m.settled) = m.done_to + 1 THEN (SELECT min(upper(r)) - 1 FROM unnest(m.settled) AS r)"
	"   ELSE m.done_to END AS done_to FROM m)"
	" UPDATE redrive.chunks AS c SET done_to = p.done_to,"
	"  settled = nullif(p.settled - int8multirange(int8range(NULL, p.done_to, '(]')), '{}'),"
	"  done = c.done + $3, succeeded = c.succeeded + $3 - $4 - $5 - $6, ignored = c.ignored + $4, failed = c.failed + $5,"
	"  waiting = c.waiting + $6, progress_at = CASE WHEN $3 > 0 THEN clock_timestamp() ELSE c.progress_at END,"
	"  state = CASE WHEN $7 THEN 'done'::redrive.chunk_state ELSE c.state END,"
	"  lease_token = CASE WHEN NOT $7 THEN c.lease_token END, lease_until = CASE WHEN NOT $7 THEN c.lease_until END,"
	"  finished_at = CASE WHEN $7 THEN clock_timestamp() END"
	" FROM p WHERE c.chunk_id = $1 AND c.lease_token = $2 AND c.lease_until IS NOT NULL",
	8, {INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, BOOLOID, INT8ARRAYOID}
};

/* A call of settle or complete. */
typedef struct Settling
{
	RedriveChunk chunk;			/* with an empty page */
	bool		closes;			/* complete */
	int			n;				/* outcomes, in the order of the items */
	int64	   *item_nos;
	RedriveOutcome *outcomes;
	bool		may_wait;		/* an outcome is retry or snoozed */

	/* of the claim */
	int64		open;			/* items not settled before */
	bool		keyed;
	bool		limited;		/* the handler has max_workers */
	bool		calls;			/* the handler has on_unlock */
	Oid			owner;
} Settling;

static void
require_argument(FunctionCallInfo fcinfo, int arg, const char *name)
{
	if (PG_ARGISNULL(arg))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("%s must not be null", name),
				 errhint("Give what redrive.claim() returned, and an array of redrive.outcome.")));
}

/* Refuse an outcome: what is wrong with it. */
static void
refuse_outcome(Settling *s, const char *what)
{
	ereport(ERROR,
			(errcode(ERRCODE_REDRIVE_BAD_OUTCOME),
			 errmsg("%s", what),
			 errdetail("Nothing of this call on chunk %lld is written down.", (long long) s->chunk.chunk_id),
			 errhint("Give one outcome for each item of the claim, once.")));
}

static OutcomeKind
parse_kind(const char *name)
{
	static const char *const names[] = {"ok", "ignored", "failed", "retry", "snoozed"};

	for (int i = 0; i < lengthof(names); i++)
		if (strcmp(name, names[i]) == 0)
			return (OutcomeKind) i;
	elog(ERROR, "unknown outcome \"%s\"", name);
}

/* Take the array of outcomes apart. */
static void
take_outcomes(Settling *s, Datum array, Oid type)
{
	Datum		values[1] = {array};

	/* another extension of the same name may have been created since */
	if (read_outcomes.argtypes[0] != type)
		read_outcomes.plan = NULL;
	read_outcomes.argtypes[0] = type;
	s->n = (int) redrive_sql(&read_outcomes, values, NULL);
	s->item_nos = palloc(Max(s->n, 1) * sizeof(int64));
	s->outcomes = palloc0(Max(s->n, 1) * sizeof(RedriveOutcome));
	for (int i = 0; i < s->n; i++)
	{
		RedriveOutcome *outcome = &s->outcomes[i];
		bool		isnull;
		Datum		delay;
		char	   *kind = redrive_text(i, "outcome", CurrentMemoryContext);

		s->item_nos[i] = redrive_int64(i, "item_no");
		(void) redrive_column(i, "item_no", &isnull);
		if (isnull)
			refuse_outcome(s, "outcome without item_no");
		if (i > 0 && s->item_nos[i] == s->item_nos[i - 1])
			refuse_outcome(s, psprintf("two outcomes for item %lld", (long long) s->item_nos[i]));
		if (kind == NULL)
			refuse_outcome(s, psprintf("outcome of item %lld is null", (long long) s->item_nos[i]));
		outcome->kind = parse_kind(kind);
		outcome->message = redrive_text(i, "message", CurrentMemoryContext);
		outcome->code = redrive_text(i, "code", CurrentMemoryContext);
		delay = redrive_column(i, "delay", &isnull);
		if (!isnull)
			outcome->delay = DatumGetIntervalP(datumCopy(delay, false, sizeof(Interval)));
		if (redrive_bool(i, "wrong_delay"))
			refuse_outcome(s, psprintf("delay of item %lld is not between 0 and 100 years", (long long) s->item_nos[i]));
		if (outcome->kind == OUTCOME_RETRY || outcome->kind == OUTCOME_SNOOZED)
			s->may_wait = true;
	}
	redrive_free_rows();
}

/* Say that the caller has no such claim. */
static void
refuse_claim(Settling *s)
{
	Datum		values[3] = {ObjectIdGetDatum(GetUserId()), Int64GetDatum(s->chunk.chunk_id), Int64GetDatum(s->chunk.lease_token)};

	(void) redrive_sql(&refuse, values, NULL);
	elog(ERROR, "a claim that is not there was not refused");
}

static void
check_member(Settling *s)
{
	if (!has_privs_of_role(GetUserId(), s->owner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for chunk %lld", (long long) s->chunk.chunk_id),
				 errdetail("It belongs to another role."),
				 errhint("Ask a member of the owning role, or a superuser.")));
}

/* Lock the claim, and read what is to be known of it, of its batch and handler. */
static void
take_claim(Settling *s)
{
	RedriveChunk *chunk = &s->chunk;
	RedriveHandler *handler = &chunk->handler;
	Datum		values[2] = {Int64GetDatum(chunk->chunk_id), Int64GetDatum(chunk->lease_token)};
	bool		isnull;

	if (s->may_wait)
		(void) redrive_sql(&lock_batch, values, NULL);
	if (redrive_sql(&lock_claim, values, NULL) == 0)
		refuse_claim(s);
	s->owner = DatumGetObjectId(redrive_column(0, "owner", &isnull));
	check_member(s);
	s->open = redrive_int64(0, "open");
	s->keyed = redrive_bool(0, "keyed");
	s->limited = redrive_bool(0, "limited");
	s->calls = redrive_bool(0, "calls");
	chunk->cxt = CurrentMemoryContext;
	chunk->batch_id = redrive_int64(0, "batch_id");
	chunk->part = DatumGetInt16(redrive_column(0, "part", &isnull));
	chunk->run_no = DatumGetInt32(redrive_column(0, "run_no", &isnull));
	handler->handler_id = DatumGetInt32(redrive_column(0, "handler_id", &isnull));
	handler->name = redrive_text(0, "name", chunk->cxt);
	handler->max_retries = DatumGetInt32(redrive_column(0, "max_retries", &isnull));
	handler->retry_delay = redrive_int64(0, "retry_delay");
	handler->retry_factor = DatumGetFloat8(redrive_column(0, "retry_factor", &isnull));
	handler->retry_delay_max = redrive_int64(0, "retry_delay_max");
}

/* An outcome is for an item that is not there: say why. */
static void
refuse_item(Settling *s, int64 item_no)
{
	Datum		values[2] = {Int64GetDatum(s->chunk.chunk_id), Int64GetDatum(item_no)};

	redrive_sql_one_row(&was_in_claim, values, NULL);
	refuse_outcome(s, psprintf(redrive_bool(0, "was") ? "item %lld of chunk %lld is settled already" : "item %lld is not in chunk %lld",
							   (long long) item_no, (long long) s->chunk.chunk_id));
}

/*
 * Read the items that have outcomes; with keys, and when the claim ends, all
 * that are open.  Returns how many; the others, of a claim that ends, succeeded
 * and nothing is to be known of them.
 */
static int
take_items(Settling *s, RedriveItem **items)
{
	Datum		values[2] = {Int64GetDatum(s->chunk.chunk_id)};
	Datum	   *wanted = palloc(Max(s->n, 1) * sizeof(Datum));
	const bool	all = s->closes && s->keyed;
	uint64		rows;
	int			next = 0;

	for (int i = 0; i < s->n; i++)
		wanted[i] = Int64GetDatum(s->item_nos[i]);
	values[1] = redrive_array(INT8OID, s->n, wanted, NULL);
	rows = redrive_sql(&open_items, values, all ? " n" : NULL);
	*items = palloc0(Max(rows, 1) * sizeof(RedriveItem));
	for (uint64 row = 0; row < rows; row++)
	{
		RedriveItem *item = &(*items)[row];
		bool		isnull;
		Datum		key = redrive_column(row, "key", &isnull);

		if (!isnull)
			item->key = DatumGetTextPCopy(key);
		item->item_no = redrive_int64(row, "item_no");
		item->attempts = DatumGetInt32(redrive_column(row, "attempts", &isnull));
		item->free_count = DatumGetInt32(redrive_column(row, "free_count", &isnull));
		item->first_failed_at = redrive_time(row, "first_failed_at");
		if (next < s->n && s->item_nos[next] == item->item_no)
			s->outcomes[next++].index = (int) row;
		else if (!all || (next < s->n && s->item_nos[next] < item->item_no))
			break;
	}
	if (next < s->n)
		refuse_item(s, s->item_nos[next]);
	redrive_free_rows();
	return (int) rows;
}

/* Write down the failures, unlock the keys of what is final, and count. */
static void
write_outcomes(Settling *s, int64 *ignored, int64 *failed, int64 *waiting)
{
	RedriveChunk *chunk = &s->chunk;
	RedriveItem *items;
	int			n_items = take_items(s, &items);
	RedriveFailure **failures = palloc(Max(s->n, 1) * sizeof(RedriveFailure *));
	Datum	   *keys = palloc(Max(n_items, 1) * sizeof(Datum));
	int			n_failures = 0;
	int			n_keys = 0;
	TimestampTz next_retry_at = 0;
	TimestampTz oldest = 0;

	for (int i = 0; i < s->n; i++)
	{
		RedriveItem *item = &items[s->outcomes[i].index];
		RedriveFailure *f = redrive_judge_outcome(chunk, item, &s->outcomes[i]);

		item->failure = f;
		if (f == NULL)
			continue;
		failures[n_failures++] = f;
		if (strcmp(f->state, "waiting") == 0)
		{
			TimestampTz since = item->first_failed_at != 0 ? item->first_failed_at : f->failed_at;

			(*waiting)++;
			if (f->next_attempt_at != 0 && (next_retry_at == 0 || f->next_attempt_at < next_retry_at))
				next_retry_at = f->next_attempt_at;
			if (oldest == 0 || since < oldest)
				oldest = since;
		}
		else if (strcmp(f->state, "ignored") == 0)
			(*ignored)++;
		else
			(*failed)++;
	}
	if (n_failures > 0)
		redrive_store_failures(chunk, n_failures, failures);
	for (int i = 0; i < n_items; i++)
		if (items[i].key != NULL && (items[i].failure == NULL || strcmp(items[i].failure->state, "waiting") != 0))
			keys[n_keys++] = PointerGetDatum(items[i].key);
	if (n_keys > 0)
	{
		Datum		values[2] = {Int64GetDatum(chunk->batch_id),
		redrive_array(TEXTOID, n_keys, keys, NULL)};

		(void) redrive_sql(&unlock, values, NULL);
		if (s->calls)
			redrive_wake_at_commit(s->owner, 0);
	}
	if (*waiting > 0)
	{
		redrive_note_waiting(chunk->batch_id, next_retry_at, oldest);
		redrive_wake_claimers_at_commit(s->owner);
	}
}

/* The general case: some items, or keys to unlock, or exceptions. */
static void
settle_items(Settling *s)
{
	int64		ignored = 0,
				failed = 0,
				waiting = 0;
	int64		done;
	Datum	   *numbers = palloc(Max(s->n, 1) * sizeof(Datum));
	Datum		values[8];

	take_claim(s);
	if (s->n > 0 || s->keyed)
		write_outcomes(s, &ignored, &failed, &waiting);
	done = s->closes ? s->open : s->n;
	for (int i = 0; i < s->n; i++)
		numbers[i] = Int64GetDatum(s->item_nos[i]);
	values[0] = Int64GetDatum(s->chunk.chunk_id);
	values[1] = Int64GetDatum(s->chunk.lease_token);
	values[2] = Int64GetDatum(done);
	values[3] = Int64GetDatum(ignored);
	values[4] = Int64GetDatum(failed);
	values[5] = Int64GetDatum(waiting);
	values[6] = BoolGetDatum(s->closes);
	values[7] = redrive_array(INT8OID, s->n, numbers, NULL);
	if (redrive_sql(&write_down, values, NULL) != 1)
		refuse_claim(s);
}

/* All items of the claim succeeded and have no keys; false = settle_items() finds out. */
static bool
settle_all(Settling *s)
{
	Datum		values[2] = {Int64GetDatum(s->chunk.chunk_id), Int64GetDatum(s->chunk.lease_token)};
	bool		isnull;

	if (redrive_sql(&complete_all, values, NULL) == 0)
		return false;
	s->owner = DatumGetObjectId(redrive_column(0, "owner", &isnull));
	s->limited = redrive_bool(0, "limited");
	check_member(s);
	return true;
}

/* What settle and complete share. */
static void
settle(FunctionCallInfo fcinfo, bool closes)
{
	Settling	s = {0};
	Oid		   *declared;
	int			nargs;

	redrive_require_writable(fcinfo);
	require_argument(fcinfo, 0, "chunk_id");
	require_argument(fcinfo, 1, "lease_token");
	require_argument(fcinfo, 2, closes ? "exceptions" : "outcomes");
	s.closes = closes;
	s.chunk.chunk_id = PG_GETARG_INT64(0);
	s.chunk.lease_token = PG_GETARG_INT64(1);
	(void) get_func_signature(fcinfo->flinfo->fn_oid, &declared, &nargs);

	redrive_connect();
	if (ARR_NDIM(PG_GETARG_ARRAYTYPE_P(2)) > 0)
		take_outcomes(&s, PG_GETARG_DATUM(2), declared[2]);
	if (!closes || s.n > 0 || !settle_all(&s))
		settle_items(&s);
	redrive_disconnect();
	if (!closes)
		return;
	redrive_fold_at_commit();
	if (s.limited)
		redrive_wake_claimers_at_commit(s.owner);
}

/* SQL: settle(chunk_id, lease_token, outcomes) */
Datum
redrive_settle(PG_FUNCTION_ARGS)
{
	settle(fcinfo, false);
	PG_RETURN_VOID();
}

/* SQL: complete(chunk_id, lease_token, exceptions) */
Datum
redrive_complete(PG_FUNCTION_ARGS)
{
	settle(fcinfo, true);
	PG_RETURN_VOID();
}
