/*-------------------------------------------------------------------------
 *
 * classify.c
 *	  What an error means for its item.
 *
 * The rules are data, and SQL decides (redrive._classify); here the answer is
 * remembered for the rest of the chunk when it does not depend on the message.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "common/hashfn.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "base/backoff.h"
#include "base/spi_call.h"
#include "flow/classify.h"

#define MAX_FREE_RETRIES 20
#define FREE_DELAY_US 500000
#define FREE_DELAY_MAX_US 60000000

/* How often a transient error is answered by trying again at once. */
#define MAX_AT_ONCE 3

PG_FUNCTION_INFO_V1(redrive_raise_validation);
PG_FUNCTION_INFO_V1(redrive_raise_user_error);

/* A rule that decided, with its hits in this chunk. */
typedef struct RuleMatch
{
	int			sqlerrcode;
	const char *constraint_name;	/* or NULL */
	bool		for_all_messages;
	int32		rule_id;
	const char *error_class;
	RuleAction	action;
	int64		hits;
} RuleMatch;

static RedriveSql find_rule = {
	"SELECT rule_id, error_class, action::text AS action, for_all_messages FROM redrive._classify($1, $2, $3, $4)",
	4, {TEXTOID, TEXTOID, TEXTOID, TEXTOID}
};

static RedriveSql add_hits = {
	"UPDATE redrive.classification_rules SET hits = hits + $2 WHERE rule_id = $1",
	2, {INT4OID, INT8OID}
};

static bool
same_constraint(const char *a, const char *b)
{
	return a == NULL || b == NULL ? a == b : strcmp(a, b) == 0;
}

static RuleAction
parse_action(const char *name)
{
	static const char *const names[] = {"ignore", "fail", "retry", "retry_free", "pause"};

	for (int i = 0; i < lengthof(names); i++)
		if (strcmp(name, names[i]) == 0)
			return (RuleAction) i;
	elog(ERROR, "unknown action \"%s\"", name);
}

/*
 * Return the rule for an error.  The result lives as long as the chunk.
 */
static RuleMatch *
match_rule(RedriveChunk *chunk, ErrorData *error)
{
	ListCell   *lc;
	RuleMatch  *match;
	Datum		values[4];
	char		nulls[] = "    ";
	char	   *action;
	bool		isnull;
	MemoryContext old_cxt;

	foreach(lc, chunk->rules)
	{
		match = lfirst(lc);
		if (match->for_all_messages && match->sqlerrcode == error->sqlerrcode &&
			same_constraint(match->constraint_name, error->constraint_name))
			return match;
	}

	values[0] = CStringGetTextDatum(chunk->handler.name);
	values[1] = CStringGetTextDatum(unpack_sql_state(error->sqlerrcode));
	values[2] = CStringGetTextDatum(error->message ? error->message : "");
	values[3] = error->constraint_name ? CStringGetTextDatum(error->constraint_name) : (Datum) 0;
	nulls[3] = error->constraint_name ? ' ' : 'n';
	old_cxt = MemoryContextSwitchTo(chunk->cxt);
	match = palloc0(sizeof(RuleMatch));
	match->sqlerrcode = error->sqlerrcode;
	match->constraint_name = error->constraint_name ? pstrdup(error->constraint_name) : NULL;
	if (redrive_sql(&find_rule, values, nulls) == 1)
	{
		match->rule_id = DatumGetInt32(redrive_column(0, "rule_id", &isnull));
		match->error_class = redrive_text(0, "error_class", chunk->cxt);
		action = redrive_text(0, "action", chunk->cxt);
		match->action = parse_action(action);
		match->for_all_messages = redrive_bool(0, "for_all_messages");
	}
	else
	{
		/* somebody removed the rule that fits all */
		match->error_class = "other";
		match->action = ACTION_RETRY;
	}
	chunk->rules = lappend(chunk->rules, match);
	MemoryContextSwitchTo(old_cxt);
	return match;
}

/*
 * Return a hash of what is the same in errors with the same cause: SQLSTATE or
 * code of the application, constraint, and the message without numbers and
 * quoted parts.
 */
static uint64
fingerprint(ErrorData *error, const char *code)
{
	const char *message = error->message ? error->message : "";
	char	   *plain = palloc(strlen(message) + 1);
	char	   *out = plain;
	uint64		hash;

	while (*message)
	{
		if (*message == '"' || *message == '\'')
		{
			const char *end = strchr(message + 1, *message);

			if (end != NULL)
			{
				*out++ = '?';
				message = end + 1;
				continue;
			}
		}
		if (*message >= '0' && *message <= '9')
		{
			*out++ = '#';
			while (*message >= '0' && *message <= '9')
				message++;
			continue;
		}
		*out++ = *message++;
	}
	hash = hash_bytes_extended((unsigned char *) plain, out - plain, error->sqlerrcode);
	if (code)
		hash = hash_combine64(hash, hash_bytes_extended((unsigned char *) code, strlen(code), 1));
	if (error->constraint_name)
		hash = hash_combine64(hash, hash_bytes_extended((unsigned char *) error->constraint_name,
														strlen(error->constraint_name), 0));
	pfree(plain);
	return hash;
}

/* Decide when a waiting item is tried again. */
static TimestampTz
next_attempt(RedriveChunk *chunk, RedriveItem *item, RedriveFailure *failure)
{
	uint64		seed = hash_combine64((uint64) chunk->batch_id, (uint64) item->item_no);

	if (failure->action == ACTION_PAUSE)
		return failure->failed_at;	/* as soon as somebody resumes the batch */
	if (failure->action == ACTION_RETRY_FREE)
		return failure->failed_at +
			redrive_backoff(FREE_DELAY_US, 2, FREE_DELAY_MAX_US, failure->free_count - 1, seed);
	if (chunk->handler.retry_delay < 0)
		return 0;				/* the pass decides */
	return failure->failed_at +
		redrive_backoff(chunk->handler.retry_delay, chunk->handler.retry_factor,
						chunk->handler.retry_delay_max, failure->retry_count, seed);
}

/*
 * Decide what an action means for an item: fill in the counts, the new state and
 * the next attempt, and begin with what does not depend on it.
 */
static void
decide(RedriveChunk *chunk, RedriveItem *item, RedriveFailure *failure, RuleAction action, ErrorData *error)
{
	failure->item = item;
	failure->error = error;
	failure->action = action;
	failure->attempts = item->attempts + 1;
	failure->free_count = item->free_count;
	failure->failed_at = GetCurrentTimestamp();
	failure->fingerprint = fingerprint(error, failure->code);

	/* free attempts are capped apart; beyond the cap they cost */
	if (failure->action == ACTION_RETRY_FREE && item->free_count >= MAX_FREE_RETRIES)
		failure->action = ACTION_RETRY;
	if (failure->action == ACTION_RETRY_FREE || failure->action == ACTION_PAUSE)
		failure->free_count++;
	failure->retry_count = Max(failure->attempts - failure->free_count - 1, 0);

	switch (failure->action)
	{
		case ACTION_IGNORE:
			failure->state = "ignored";
			break;
		case ACTION_FAIL:
			failure->state = "failed";
			failure->reason = "non_retryable";
			break;
		case ACTION_RETRY:
			if (failure->retry_count >= chunk->handler.max_retries)
			{
				failure->state = "failed";
				failure->reason = "exhausted";
				break;
			}
			/* fall through */
		case ACTION_RETRY_FREE:
		case ACTION_PAUSE:
			failure->state = "waiting";
			failure->next_attempt_at = next_attempt(chunk, item, failure);
			break;
	}
}

/*
 * Turn the error of an item into a failure: class, new state, next attempt.
 *
 * The result is in CurrentMemoryContext and keeps the error.
 */
RedriveFailure *
redrive_classify(RedriveChunk *chunk, RedriveItem *item, ErrorData *error)
{
	RuleMatch  *match = match_rule(chunk, error);
	RedriveFailure *failure = palloc0(sizeof(RedriveFailure));

	match->hits++;
	failure->rule_id = match->rule_id;
	failure->error_class = match->error_class;
	decide(chunk, item, failure, match->action, error);
	return failure;
}

/* Does a rule say that this error goes away when it is tried again? */
bool
redrive_is_transient(RedriveChunk *chunk, ErrorData *error)
{
	RuleMatch  *match = match_rule(chunk, error);

	return match->action == ACTION_RETRY_FREE && strcmp(match->error_class, "transient") == 0;
}

/*
 * Turn what a set handler said about an item into a failure; NULL when the item
 * succeeded.
 *
 * The outcome decides what follows.  The rules only tell the class of the code,
 * so that items that fail for one cause are found together, returned or raised.
 * The result is in CurrentMemoryContext.
 */
RedriveFailure *
redrive_judge_outcome(RedriveChunk *chunk, RedriveItem *item, RedriveOutcome *outcome)
{
	static const struct
	{
		RuleAction	action;
		int			sqlerrcode;
		const char *message;
	}			defaults[] =
	{
		[OUTCOME_IGNORED] = {ACTION_IGNORE, ERRCODE_REDRIVE_VALIDATION, "the handler returned \"ignored\""},
		[OUTCOME_FAILED] = {ACTION_FAIL, ERRCODE_RAISE_EXCEPTION, "the handler returned \"failed\""},
		[OUTCOME_RETRY] = {ACTION_RETRY, ERRCODE_RAISE_EXCEPTION, "the handler returned \"retry\""},
		[OUTCOME_SNOOZED] = {ACTION_RETRY_FREE, ERRCODE_SUCCESSFUL_COMPLETION, "the handler returned \"snoozed\""},
	};
	RedriveFailure *failure;
	ErrorData  *error;
	const char *code = outcome->code;

	if (outcome->kind == OUTCOME_OK)
		return NULL;
	failure = palloc0(sizeof(RedriveFailure));
	error = palloc0(sizeof(ErrorData));
	error->message = pstrdup(outcome->message ? outcome->message : defaults[outcome->kind].message);
	if (code == NULL || code[0] == '\0')
		error->sqlerrcode = defaults[outcome->kind].sqlerrcode;
	else if (strlen(code) == 5 && strspn(code, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ") == 5)
		error->sqlerrcode = MAKE_SQLSTATE(code[0], code[1], code[2], code[3], code[4]);
	else
		failure->code = pstrdup(code);	/* fits no SQLSTATE of a rule */
	failure->error_class = outcome->kind == OUTCOME_SNOOZED ? "snoozed" : match_rule(chunk, error)->error_class;
	decide(chunk, item, failure, defaults[outcome->kind].action, error);
	if (strcmp(failure->state, "waiting") == 0 && outcome->delay != NULL)
		failure->next_attempt_at =
			DatumGetTimestampTz(DirectFunctionCall2(timestamptz_pl_interval, TimestampTzGetDatum(failure->failed_at),
													IntervalPGetDatum(outcome->delay)));
	return failure;
}

/*
 * Decide about an item that failed.  Returns false when it is not settled: it
 * is to be tried again at once, in a new interval.
 */
bool
redrive_settle_failure(RedriveChunk *chunk, RedriveInterval *interval, RedriveSlot *slot, int k, ErrorData *error)
{
	RedriveItem *item = &chunk->page[k];
	MemoryContext old_cxt = MemoryContextSwitchTo(interval->cxt);
	RedriveFailure *failure = redrive_classify(chunk, item, error);

	MemoryContextSwitchTo(old_cxt);
	if (failure->action == ACTION_RETRY_FREE && strcmp(failure->error_class, "transient") == 0 &&
		item->at_once < MAX_AT_ONCE)
	{
		item->at_once++;
		return false;
	}
	item->failure = failure;
	slot->open_failed++;
	if (failure->action == ACTION_PAUSE)
		interval->pause_reason = MemoryContextStrdup(chunk->cxt,
													 psprintf("item %lld: %s: %s", (long long) item->item_no,
															  unpack_sql_state(error->sqlerrcode),
															  error->message ? error->message : ""));
	return true;
}

static int
compare_rule_ids(const ListCell *a, const ListCell *b)
{
	int32		left = ((RuleMatch *) lfirst(a))->rule_id;
	int32		right = ((RuleMatch *) lfirst(b))->rule_id;

	return (left > right) - (left < right);
}

/*
 * Make the failure of an item that crashed the server too often to be run again.
 *
 * The result is in CurrentMemoryContext.
 */
RedriveFailure *
redrive_quarantine(RedriveItem *item)
{
	RedriveFailure *failure = palloc0(sizeof(RedriveFailure));
	ErrorData  *error = palloc0(sizeof(ErrorData));

	error->sqlerrcode = ERRCODE_CRASH_SHUTDOWN;
	error->message = psprintf("the item crashed the server %d times", item->crash_count);
	error->detail = pstrdup("The server process that executed it died.");
	error->hint = pstrdup("The server log says of what. When that is mended, run the item again with redrive.redrive().");
	failure->item = item;
	failure->error = error;
	failure->action = ACTION_FAIL;
	failure->error_class = "crash";
	failure->state = "failed";
	failure->reason = "quarantined";
	failure->attempts = item->attempts + 1;
	failure->free_count = item->free_count;
	failure->retry_count = Max(failure->attempts - failure->free_count - 1, 0);
	failure->failed_at = GetCurrentTimestamp();
	failure->fingerprint = fingerprint(error, NULL);
	return failure;
}

/*
 * Add the hits of this chunk to the rules, in the order of their numbers.
 *
 * Workers of all roles share these rows.  So this is the last thing in the small
 * transaction that ends the chunk: nobody waits for anything while he has them.
 */
void
redrive_count_rule_hits(RedriveChunk *chunk)
{
	ListCell   *lc;

	list_sort(chunk->rules, compare_rule_ids);
	foreach(lc, chunk->rules)
	{
		RuleMatch  *match = lfirst(lc);
		Datum		values[2];

		if (match->hits == 0 || match->rule_id == 0)
			continue;
		values[0] = Int32GetDatum(match->rule_id);
		values[1] = Int64GetDatum(match->hits);
		(void) redrive_sql(&add_hits, values, NULL);
		match->hits = 0;
	}
}

/* Raise an error of our own on behalf of a handler. */
static void
raise_for_handler(FunctionCallInfo fcinfo, int sqlerrcode)
{
	ereport(ERROR,
			(errcode(sqlerrcode),
			 errmsg_internal("%s", PG_ARGISNULL(0) ? "" : text_to_cstring(PG_GETARG_TEXT_PP(0))),
			 PG_ARGISNULL(1) ? 0 : errdetail_internal("%s", text_to_cstring(PG_GETARG_TEXT_PP(1)))));
}

/* SQL: raise_validation(message, detail) */
Datum
redrive_raise_validation(PG_FUNCTION_ARGS)
{
	raise_for_handler(fcinfo, ERRCODE_REDRIVE_VALIDATION);
	PG_RETURN_VOID();
}

/* SQL: raise_user_error(message, detail) */
Datum
redrive_raise_user_error(PG_FUNCTION_ARGS)
{
	raise_for_handler(fcinfo, ERRCODE_REDRIVE_USER_ERROR);
	PG_RETURN_VOID();
}
