/*-------------------------------------------------------------------------
 *
 * push_judge.c
 *	  Ask success_when of platforms about their answers.
 *
 * The path is of a user, and so is what it looks at: it may fail, or take long.
 * So each platform is asked apart, in transactions of its own and for a short
 * time, before anything is recorded.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timeout.h"
#include "utils/timestamp.h"

#include "base/spi_call.h"
#include "base/xact.h"
#include "flow/push.h"

#define JUDGE_MS 100			/* for all answers of a platform, then once
								 * more for one after the other */

/* Which answers are what success_when wants.  $1 answers, $2 success_when. */
static RedriveSql judge_answers = {
	"SELECT n.place FROM unnest($1) WITH ORDINALITY AS n (answer, place) WHERE jsonb_path_match(n.answer::jsonb, $2, '{}', true)",
	2, {TEXTARRAYOID, JSONPATHOID}
};

/* A push was answered, but not as its platform should. */
static void
reject(Push *p, const char *message)
{
	p->delivered = false;
	p->charged = true;
	p->error_class = "rejected";
	p->message = message;
}

/*
 * Reject the pushes, all of one platform, whose answers are not what success_when wants.
 *
 * Runs in a transaction of its own, so long at most.  Returns the code of the error that
 * ended it, and has rejected none then; 0 = there was none.
 */
static int
ask(Push **pushes, int n, int ms)
{
	MemoryContext old_cxt = CurrentMemoryContext;
	bool	   *fits = palloc0(n * sizeof(bool));
	Datum	   *answers = palloc(n * sizeof(Datum));
	volatile int sqlstate = 0;

	PG_TRY();
	{
		Datum		args[2];
		uint64		rows;

		redrive_worker_begin();
		MemoryContextSwitchTo(old_cxt);
		for (int i = 0; i < n; i++)
			answers[i] = CStringGetTextDatum(pushes[i]->answer);
		args[0] = redrive_array(TEXTOID, n, answers, NULL);
		args[1] = pushes[0]->platform->success_when;
		enable_timeout_after(STATEMENT_TIMEOUT, ms);
		rows = redrive_sql(&judge_answers, args, NULL);
		disable_timeout(STATEMENT_TIMEOUT, false);
		for (uint64 row = 0; row < rows; row++)
			fits[redrive_int64(row, "place") - 1] = true;
		redrive_worker_end();
	}
	PG_CATCH();
	{
		disable_timeout(STATEMENT_TIMEOUT, false);
		MemoryContextSwitchTo(old_cxt);
		if (ProcDiePending)
			PG_RE_THROW();
		sqlstate = geterrcode();
		FlushErrorState();
		redrive_worker_abort();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(old_cxt);
	/* the time-out may have come too late for its statement */
	QueryCancelPending = false;
	for (int i = 0; sqlstate == 0 && i < n; i++)
		if (!fits[i])
			reject(pushes[i], "success_when is not true of the answer.");
	return sqlstate;
}

/*
 * Judge the answers of one platform, of those that are not judged yet; return whether there
 * were any.
 *
 * If they cannot be judged at once, one after the other, and each gets half of the time
 * that is left: so the culprits are found, and quick ones are judged behind slow ones.
 */
bool
redrive_judge_answers(Push **pushes, int n)
{
	Push	  **asked = NULL;
	int			n_asked = 0;

	for (int i = 0; i < n; i++)
	{
		if (pushes[i]->answer == NULL || (asked != NULL && pushes[i]->platform != asked[0]->platform))
			continue;
		if (asked == NULL)
			asked = palloc((n - i) * sizeof(Push *));
		asked[n_asked++] = pushes[i];
	}
	if (asked == NULL)
		return false;
	/* it may have been unset since the request was sent */
	if (asked[0]->platform->success_when != (Datum) 0 && ask(asked, n_asked, JUDGE_MS) != 0)
	{
		const TimestampTz end = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), JUDGE_MS);

		for (int i = 0; i < n_asked; i++)
		{
			const int	ms = (int) TimestampDifferenceMilliseconds(GetCurrentTimestamp(), end) / 2;
			const int	sqlstate = ms > 0 ? ask(&asked[i], 1, ms) : ERRCODE_QUERY_CANCELED;

			if (sqlstate != 0)
				reject(asked[i], sqlstate == ERRCODE_QUERY_CANCELED ? "success_when takes too long." : "The answer cannot be judged by success_when.");
		}
	}
	for (int i = 0; i < n_asked; i++)
	{
		asked[i]->answer = NULL;
		redrive_teach_platform(asked[i]);
	}
	return true;
}
