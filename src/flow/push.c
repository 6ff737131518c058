/*-------------------------------------------------------------------------
 *
 * push.c
 *	  Statements of the pusher: claim, record, reap.
 *
 * A claim counts the attempt and is committed before anything is sent; a record
 * is fenced by the number of the attempt, so a late one changes nothing.  All
 * run in a transaction of the caller's.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/guc.h"
#include "base/spi_call.h"
#include "base/table_insert.h"
#include "flow/push.h"

#define MAX_FREE_RETRIES 20

/* arrays without a name in pg_type.h */
#define BOOLARRAY 1000
#define TIMESTAMPTZARRAY 1185

#define NOT_TRUE "'success_when is not true of the answer.'"

/*
 * The version that is sent is that of the task as this statement sees it, with
 * the body of the same row: if a newer one is wanted by then, the record finds
 * out.
 */
static RedriveSql claim_pushes = {
	.lookups = true,
	.text =
	"WITH due AS MATERIALIZED ("
	" SELECT d.push_id, d.task_id, w.platform_id, w.probe, w.built FROM unnest($1, $2, $3, $4) AS w (platform_id, room, probe, built)"
	" CROSS JOIN LATERAL (SELECT x.push_id, x.task_id FROM redrive.pushes AS x"
	"  WHERE x.platform_id = w.platform_id AND NOT x.awaits_build AND x.state IN ('pending', 'waiting') AND x.next_attempt_at <= $5"
	"  ORDER BY x.next_attempt_at LIMIT w.room FOR UPDATE SKIP LOCKED) AS d),"
	/* narrow: the update keeps a copy of each row it joins with */
	" wanted AS MATERIALIZED (SELECT d.push_id, d.probe, coalesce(b.version, t.version) AS version, $5 + p.lease AS lease_until"
	"  FROM due AS d"
	"  CROSS JOIN LATERAL (SELECT z.version FROM redrive.tasks AS z WHERE z.task_id = d.task_id OFFSET 0) AS t"
	"  CROSS JOIN LATERAL (SELECT z.lease FROM redrive.platforms AS z WHERE z.platform_id = d.platform_id OFFSET 0) AS p"
	"  LEFT JOIN LATERAL (SELECT z.version FROM redrive.push_bodies AS z WHERE d.built AND z.push_id = d.push_id OFFSET 0) AS b ON true),"
	" claimed AS (UPDATE redrive.pushes AS u SET state = 'in_flight', attempt_no = u.attempt_no + 1, lease_until = w.lease_until, lease_owner = $6,"
	"  sent_version = w.version, is_probe = w.probe"
	"  FROM wanted AS w WHERE u.push_id = w.push_id"
	"  RETURNING u.push_id, u.task_id, u.platform_id, u.attempt_no, u.sent_version, u.push_key, u.is_probe)"
	" SELECT c.push_id, c.platform_id::int8 AS platform_id, c.attempt_no, c.sent_version, c.push_key::text || '-' || c.sent_version AS id, c.is_probe,"
	"  coalesce((SELECT z.body FROM redrive.push_bodies AS z WHERE z.push_id = c.push_id AND z.version = c.sent_version"
	"   AND EXISTS (SELECT FROM redrive.platforms AS p WHERE p.platform_id = c.platform_id AND p.build IS NOT NULL)),"
	"   json_build_object('task_key', t.task_key, 'status', t.status, 'version', t.version, 'process', t.process,"
	"   'payload', t.payload, 'created_at', t.created_at, 'changed_at', t.changed_at)::text) AS body"
	" FROM claimed AS c CROSS JOIN LATERAL (SELECT z.* FROM redrive.tasks AS z WHERE z.task_id = c.task_id OFFSET 0) AS t",
	.nargs = 6,.argtypes = {INT4ARRAYOID, INT4ARRAYOID, BOOLARRAY, BOOLARRAY, TIMESTAMPTZOID, INT8OID}
};

/*
 * What a push becomes.  It asks the row as it is when it is changed: a new
 * version may have been wanted since the statement began.
 */
#define COSTS "(r.charged OR (r.rejected AND NOT u.is_probe))"
#define NEXT_STATE \
	"CASE WHEN r.given_back OR u.wanted_version > u.sent_version THEN 'pending'" \
	" WHEN r.delivered THEN 'delivered' WHEN r.blocked THEN 'blocked' WHEN r.permanent THEN 'dead'" \
	" WHEN " COSTS " AND u.retry_count >= p.max_retries THEN 'dead'" \
	" WHEN NOT " COSTS " AND NOT u.is_probe AND u.free_count >= $16 THEN 'dead'" \
	" ELSE 'waiting' END"

/*
 * What became of each.  $1 number, $2 attempt, $3 platform, $4 delivered, $5
 * charged, $6 permanent, $7 blocked, $8 given back, $9 least wait in ms, $10
 * class, $11 status, $12 message, $13 answer, $14 end; $15 now, $16 the attempts
 * that may be free.  Returns those that were still ours.
 */
static RedriveSql record_pushes = {
	.lookups = true,
	.text =
	"WITH r AS MATERIALIZED ("
	" SELECT n.place, n.push_id, n.attempt_no, n.platform_id, n.charged, n.permanent, n.blocked, n.given_back, n.wait_ms, n.http_status, n.finished_at,"
	"  n.delivered AND j.fits AS delivered, n.delivered AND NOT j.fits AS rejected,"
	"  CASE WHEN j.fits THEN n.error_class ELSE 'rejected' END AS error_class, CASE WHEN j.fits THEN n.message ELSE " NOT_TRUE " END AS message"
	" FROM unnest($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14) WITH ORDINALITY AS n (push_id, attempt_no, platform_id,"
	"  delivered, charged, permanent, blocked, given_back, wait_ms, error_class, http_status, message, answer, finished_at, place)"
	" CROSS JOIN LATERAL (SELECT n.answer IS NULL OR coalesce((SELECT p.success_when IS NULL OR jsonb_path_match(n.answer::jsonb, p.success_when, '{}', true)"
	"  FROM redrive.platforms AS p WHERE p.platform_id = n.platform_id), false) AS fits OFFSET 0) AS j)"
	" UPDATE redrive.pushes AS u SET"
	"  state = (" NEXT_STATE ")::redrive.push_state,"
	"  retry_count = CASE " NEXT_STATE " WHEN 'waiting' THEN u.retry_count + " COSTS "::int"
	"   WHEN 'pending' THEN CASE WHEN u.wanted_version > u.sent_version THEN 0 ELSE u.retry_count END ELSE u.retry_count END,"
	"  free_count = CASE WHEN " NEXT_STATE " = 'waiting' AND NOT " COSTS " AND NOT u.is_probe THEN u.free_count + 1 ELSE u.free_count END,"
	"  next_attempt_at = CASE " NEXT_STATE " WHEN 'waiting' THEN $15 + greatest(r.wait_ms * interval '1 ms',"
	"   CASE WHEN " COSTS " THEN redrive._retry_delay(p.retry_interval, p.retry_factor, p.retry_delay_max, u.retry_count, u.push_id)"
	"   ELSE interval '1 s' * least(u.free_count + 1, 60) END)"
	"   WHEN 'pending' THEN $15 ELSE u.next_attempt_at END,"
	"  pushed_version = CASE WHEN r.delivered THEN u.sent_version ELSE u.pushed_version END,"
	"  pushed_status = CASE WHEN r.delivered AND u.wanted_version = u.sent_version THEN u.wanted_status WHEN r.delivered THEN NULL ELSE u.pushed_status END,"
	"  delivered_at = CASE WHEN r.delivered THEN r.finished_at ELSE u.delivered_at END,"
	"  failed_at = CASE WHEN r.delivered OR r.given_back THEN u.failed_at ELSE r.finished_at END,"
	"  http_status = CASE WHEN r.given_back THEN u.http_status ELSE nullif(r.http_status, 0) END,"
	"  error_class = CASE WHEN r.given_back THEN u.error_class ELSE r.error_class END,"
	"  message = CASE WHEN r.given_back THEN u.message ELSE r.message END,"
	"  lease_until = NULL, lease_owner = NULL"
	" FROM r"
	" CROSS JOIN LATERAL (SELECT z.max_retries, z.retry_interval, z.retry_factor, z.retry_delay_max FROM redrive.platforms AS z WHERE z.platform_id = r.platform_id OFFSET 0) AS p"
	" WHERE u.push_id = r.push_id AND u.state = 'in_flight' AND u.attempt_no = r.attempt_no"
	" RETURNING r.place, r.rejected, " COSTS " AS charged",
	.nargs = 16,.argtypes = {INT8ARRAYOID, INT8ARRAYOID, INT4ARRAYOID, BOOLARRAY, BOOLARRAY, BOOLARRAY, BOOLARRAY, BOOLARRAY, INT4ARRAYOID, TEXTARRAYOID,
	INT4ARRAYOID, TEXTARRAYOID, TEXTARRAYOID, TIMESTAMPTZARRAY, TIMESTAMPTZOID, INT4OID}
};

/* What build functions made for these is not needed any more. */
static RedriveSql delete_bodies = {
	.lookups = true,
	.text =
	"DELETE FROM redrive.push_bodies AS b USING unnest($1) AS n (push_id), redrive.pushes AS u"
	" WHERE b.push_id = n.push_id AND u.push_id = n.push_id AND u.state = 'delivered'",
	.nargs = 1,.argtypes = {INT8ARRAYOID}
};

static RedriveSql current_part = {
	"SELECT r.part::int8 AS part FROM redrive.rotation AS r",
	0, {0}
};

static RedriveSql next_push = {
	"SELECT n.at AS at, w.platform_id::int8 AS platform_id FROM unnest($1) AS w (platform_id)"
	" CROSS JOIN LATERAL (SELECT x.next_attempt_at AS at FROM redrive.pushes AS x WHERE x.platform_id = w.platform_id AND NOT x.awaits_build AND x.state IN ('pending', 'waiting')"
	" ORDER BY x.next_attempt_at LIMIT 1) AS n",
	1, {INT4ARRAYOID}
};

static RedriveSql reap_pushes = {
	"SELECT redrive._reap_pushes($1, $2) AS reaped",
	2, {TIMESTAMPTZOID, INT8OID}
};

/*
 * Claim what is due, at most room in all and what each platform has room for.
 *
 * Returns a list of Claimed in the current context, which has to outlive the
 * transaction; their pushes are in cxt.  The transaction has to be committed
 * before anything is sent.
 */
List *
redrive_claim_pushes(List *platforms, int room, int64 pusher, MemoryContext cxt)
{
	const TimestampTz now = GetCurrentTimestamp();
	MemoryContext result_cxt = CurrentMemoryContext;
	int			n_active = 0;
	int			http_share;
	int			n = 0;
	int			size = Max(list_length(platforms), 1);
	Datum	   *ids = palloc(size * sizeof(Datum));
	Datum	   *rooms = palloc(size * sizeof(Datum));
	Datum	   *probes = palloc(size * sizeof(Datum));
	Datum	   *built = palloc(size * sizeof(Datum));
	Datum		values[6];
	List	   *claimed = NIL;
	ListCell   *lc;
	uint64		rows;

	foreach(lc, platforms)
		if (!((Platform *) lfirst(lc))->paused)
		n_active++;
	http_share = redrive_push_max_in_flight / Max(n_active, 1);
	foreach(lc, platforms)
	{
		Platform   *p = lfirst(lc);

		/* nobody gets so much that nothing is left for another */
		int			own = Min(redrive_room_of(p, Max(http_share, 1), now), room);

		p->asked = 0;
		if (own <= 0 || !p->more_due)
			continue;
		p->asked = own;
		ids[n] = Int32GetDatum(p->platform_id);
		rooms[n] = Int32GetDatum(own);
		probes[n] = BoolGetDatum(p->breaker == BREAKER_HALF_OPEN);
		built[n] = BoolGetDatum(p->has_build);
		room -= own;
		n++;
	}
	if (n == 0)
		return NIL;
	values[0] = PointerGetDatum(construct_array(ids, n, INT4OID, sizeof(int32), true, TYPALIGN_INT));
	values[1] = PointerGetDatum(construct_array(rooms, n, INT4OID, sizeof(int32), true, TYPALIGN_INT));
	values[2] = PointerGetDatum(construct_array(probes, n, BOOLOID, sizeof(bool), true, TYPALIGN_CHAR));
	values[3] = PointerGetDatum(construct_array(built, n, BOOLOID, sizeof(bool), true, TYPALIGN_CHAR));
	values[4] = TimestampTzGetDatum(now);
	values[5] = Int64GetDatum(pusher);
	rows = redrive_sql(&claim_pushes, values, NULL);
	for (uint64 row = 0; row < rows; row++)
	{
		Claimed    *c = MemoryContextAllocZero(result_cxt, sizeof(Claimed));
		Push	   *push = MemoryContextAllocZero(cxt, sizeof(Push));
		int32		platform_id = (int32) redrive_int64(row, "platform_id");
		MemoryContext old_cxt;

		foreach(lc, platforms)
			if (((Platform *) lfirst(lc))->platform_id == platform_id)
			push->platform = lfirst(lc);
		push->push_id = redrive_int64(row, "push_id");
		push->attempt_no = redrive_int64(row, "attempt_no");
		push->version = redrive_int64(row, "sent_version");
		push->is_probe = redrive_bool(row, "is_probe");
		push->started_at = now;
		push->platform->asked--;
		c->push = push;
		c->id = redrive_text(row, "id", result_cxt);
		c->body = redrive_text(row, "body", result_cxt);
		old_cxt = MemoryContextSwitchTo(result_cxt);
		claimed = lappend(claimed, c);
		MemoryContextSwitchTo(old_cxt);
	}
	/* who gave less than was asked for has no more */
	foreach(lc, platforms)
		if (((Platform *) lfirst(lc))->asked > 0)
		((Platform *) lfirst(lc))->more_due = false;
	redrive_free_rows();
	return claimed;
}

/* Columns of push_log, in the order of the table. */
enum
{
	L_PART, L_PUSH_ID, L_ATTEMPT, L_PLATFORM, L_VERSION, L_STARTED, L_FINISHED, L_DELIVERED, L_CHARGED, L_PROBE, L_CLASS, L_STATUS, L_CURL,
	L_MESSAGE, L_RESPONSE, L_COLUMNS
};

/* Write the attempts of those that record_pushes returned into the log. */
static void
log_attempts(Push **pushes, uint64 rows, bool without_answers)
{
	Datum	   *all = palloc0(rows * L_COLUMNS * sizeof(Datum));
	bool	   *all_nulls = palloc0(rows * L_COLUMNS * sizeof(bool));
	int			n = 0;
	int			part;

	for (uint64 row = 0; row < rows; row++)
	{
		Push	   *p = pushes[redrive_int64(row, "place") - 1];
		const bool	rejected = redrive_bool(row, "rejected");
		const char *error_class = rejected ? "rejected" : p->error_class;
		const char *message = rejected ? "success_when is not true of the answer." : p->message;
		const char *response = without_answers ? NULL : p->response;
		Datum	   *values = all + n * L_COLUMNS;
		bool	   *nulls = all_nulls + n * L_COLUMNS;

		if (p->given_back)
			continue;
		n++;
		values[L_PUSH_ID] = Int64GetDatum(p->push_id);
		values[L_ATTEMPT] = Int64GetDatum(p->attempt_no);
		values[L_PLATFORM] = Int32GetDatum(p->platform->platform_id);
		values[L_VERSION] = Int64GetDatum(p->version);
		values[L_STARTED] = TimestampTzGetDatum(p->started_at);
		values[L_FINISHED] = TimestampTzGetDatum(p->finished_at);
		values[L_DELIVERED] = BoolGetDatum(p->delivered && !rejected);
		values[L_CHARGED] = BoolGetDatum(redrive_bool(row, "charged"));
		values[L_PROBE] = BoolGetDatum(p->is_probe);
		nulls[L_CLASS] = error_class == NULL;
		values[L_CLASS] = error_class != NULL ? CStringGetTextDatum(error_class) : (Datum) 0;
		nulls[L_STATUS] = p->status == 0;
		values[L_STATUS] = Int32GetDatum(p->status);
		nulls[L_CURL] = p->failure_code == 0;
		values[L_CURL] = Int32GetDatum(p->failure_code);
		nulls[L_MESSAGE] = message == NULL;
		values[L_MESSAGE] = message != NULL ? CStringGetTextDatum(message) : (Datum) 0;
		nulls[L_RESPONSE] = response == NULL;
		values[L_RESPONSE] = response != NULL ? CStringGetTextDatum(response) : (Datum) 0;
	}
	redrive_sql_one_row(&current_part, NULL, NULL);
	part = (int) redrive_int64(0, "part");
	for (int i = 0; i < n; i++)
		all[i * L_COLUMNS + L_PART] = Int16GetDatum(part);
	if (n > 0)
		redrive_table_insert(psprintf("push_log_%d", part), L_COLUMNS, n, all, all_nulls);
}

/*
 * Write down what came of pushes.
 *
 * without_answers: leave out what platforms said, because it could not be
 * stored; such pushes are not delivered if success_when wanted to see it.
 */
void
redrive_record_pushes(Push **pushes, int n, bool without_answers)
{
	enum
	{
		ID, ATTEMPT, PLATFORM, DELIVERED, CHARGED, PERMANENT, BLOCKED, GIVEN_BACK, WAIT, CLASS, STATUS, MESSAGE, ANSWER, FINISHED, N_COLUMNS
	};
	static const Oid types[N_COLUMNS] = {
		INT8OID, INT8OID, INT4OID, BOOLOID, BOOLOID, BOOLOID, BOOLOID, BOOLOID, INT4OID, TEXTOID, INT4OID, TEXTOID, TEXTOID, TIMESTAMPTZOID
	};
	Datum	   *values[N_COLUMNS];
	bool	   *nulls[N_COLUMNS];
	Datum		args[N_COLUMNS + 2];
	bool		any_built = false;

	for (int c = 0; c < N_COLUMNS; c++)
	{
		values[c] = palloc0(n * sizeof(Datum));
		nulls[c] = palloc0(n * sizeof(bool));
	}
#define SET_TEXT(column, text) \
	do { \
		if ((text) != NULL) values[column][i] = CStringGetTextDatum(text); else nulls[column][i] = true; \
	} while (0)
	for (int i = 0; i < n; i++)
	{
		Push	   *p = pushes[i];

		/* its answer cannot be read, so it is not what was wanted */
		if (without_answers && p->answer != NULL)
		{
			p->delivered = false;
			p->charged = !p->is_probe;
			p->error_class = "rejected";
			p->message = "The answer cannot be read as JSON.";
			p->answer = NULL;
		}
		any_built |= p->platform->has_build;
		values[ID][i] = Int64GetDatum(p->push_id);
		values[ATTEMPT][i] = Int64GetDatum(p->attempt_no);
		values[PLATFORM][i] = Int32GetDatum(p->platform->platform_id);
		values[DELIVERED][i] = BoolGetDatum(p->delivered);
		values[CHARGED][i] = BoolGetDatum(p->charged);
		values[PERMANENT][i] = BoolGetDatum(p->permanent);
		values[BLOCKED][i] = BoolGetDatum(p->blocked);
		values[GIVEN_BACK][i] = BoolGetDatum(p->given_back);
		values[WAIT][i] = Int32GetDatum(p->wait_ms);
		SET_TEXT(CLASS, p->error_class);
		values[STATUS][i] = Int32GetDatum(p->status);
		SET_TEXT(MESSAGE, p->message);
		SET_TEXT(ANSWER, p->answer);
		values[FINISHED][i] = TimestampTzGetDatum(p->finished_at);
	}
#undef SET_TEXT
	for (int c = 0; c < N_COLUMNS; c++)
	{
		int			dims[1] = {n};
		int			lbs[1] = {1};
		int16		len;
		bool		byval;
		char		align;

		get_typlenbyvalalign(types[c], &len, &byval, &align);
		args[c] = PointerGetDatum(construct_md_array(values[c], nulls[c], 1, dims, lbs, types[c], len, byval, align));
	}
	args[N_COLUMNS] = TimestampTzGetDatum(GetCurrentTimestamp());
	args[N_COLUMNS + 1] = Int32GetDatum(MAX_FREE_RETRIES);
	log_attempts(pushes, redrive_sql(&record_pushes, args, NULL), without_answers);
	if (any_built)
		(void) redrive_sql(&delete_bodies, args, NULL);
}

static TimestampTz
time_of(int row, const char *name)
{
	bool		isnull;
	Datum		value = redrive_column(row, name, &isnull);

	return isnull ? 0 : DatumGetTimestampTz(value);
}

/* Something may have become due anywhere. */
void
redrive_look_at_all(List *platforms)
{
	ListCell   *lc;

	foreach(lc, platforms)
		((Platform *) lfirst(lc))->more_due = true;
}

/*
 * Return when to claim next, if nothing happens before; DT_NOEND = no time is
 * known.  claimed is what was just claimed and will be under way.
 */
TimestampTz
redrive_next_push(List *platforms, List *claimed)
{
	const TimestampTz now = GetCurrentTimestamp();
	TimestampTz next = DT_NOEND;
	Datum	   *ids = palloc(Max(list_length(platforms), 1) * sizeof(Datum));
	int			n = 0;
	ListCell   *lc;
	Datum		values[1];
	uint64		rows;

	foreach(lc, claimed)
		((Claimed *) lfirst(lc))->push->platform->in_flight++;
	foreach(lc, platforms)
	{
		Platform   *p = lfirst(lc);

		p->ready_at = redrive_platform_ready_at(p, now);
		if (p->ready_at != DT_NOEND)
			ids[n++] = Int32GetDatum(p->platform_id);
	}
	foreach(lc, claimed)
		((Claimed *) lfirst(lc))->push->platform->in_flight--;
	if (n == 0)
		return DT_NOEND;
	values[0] = PointerGetDatum(construct_array(ids, n, INT4OID, sizeof(int32), true, TYPALIGN_INT));
	rows = redrive_sql(&next_push, values, NULL);
	for (uint64 row = 0; row < rows; row++)
	{
		TimestampTz at = time_of(row, "at");
		int32		id = (int32) redrive_int64(row, "platform_id");

		foreach(lc, platforms)
		{
			Platform   *p = lfirst(lc);

			if (p->platform_id == id)
				next = Min(next, Max(at, p->ready_at));
		}
	}
	return next;
}

/*
 * End attempts of pushers that are gone; with pusher, all that are not its own.
 * Returns how many.
 */
int64
redrive_reap_pushes(int64 pusher)
{
	Datum		values[2];

	values[0] = TimestampTzGetDatum(GetCurrentTimestamp());
	values[1] = Int64GetDatum(pusher);
	redrive_sql_one_row(&reap_pushes, values, pusher != 0 ? NULL : " n");
	return redrive_int64(0, "reaped");
}
