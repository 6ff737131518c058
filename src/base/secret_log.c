/*-------------------------------------------------------------------------
 *
 * secret_log.c
 *	  Keep secrets out of the server log.
 *
 * set_platform_secret() takes its statement out of where others could read it
 * when it runs.  But some statements never come so far, for want of a right or
 * of an argument, and some settings write all of them.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "tcop/tcopprot.h"
#include "utils/elog.h"

#include "base/secret_log.h"

static emit_log_hook_type next_hook = NULL;

static bool
mentions(const char *text)
{
	return text != NULL && strcasestr(text, "set_platform_secret") != NULL;
}

/*
 * Of what goes into the log, leave statements out that set a secret.
 *
 * Messages of errors stay.  What has no statement of its own is one: it was written by
 * log_statement, log_min_duration_statement, auto_explain or the like.
 */
static void
hide_secrets(ErrorData *edata)
{
	if (mentions(debug_query_string) || mentions(edata->message) || mentions(edata->detail) ||
		mentions(edata->context) || mentions(edata->internalquery))
	{
		if (edata->elevel <= LOG && edata->hide_stmt)
		{
			edata->message = pstrdup("a statement that sets a secret of a platform is left out");
			edata->detail = NULL;
		}
		edata->hide_stmt = true;
		edata->hide_ctx = true;
		edata->internalquery = NULL;
	}
	if (next_hook != NULL)
		next_hook(edata);
}

void
redrive_install_log_hook(void)
{
	next_hook = emit_log_hook;
	emit_log_hook = hide_secrets;
}
