/* Preloaded into a server, makes the moment long in which a background worker that starts ignores a reload; for tests. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <unistd.h>

int
sigaction(int number, const struct sigaction *action, struct sigaction *before)
{
	int			(*real) (int, const struct sigaction *, struct sigaction *) = dlsym(RTLD_NEXT, "sigaction");

	if (number == SIGHUP && action != NULL && action->sa_handler == SIG_IGN)
		usleep(1000000);		/* -- slow handler */
	return real(number, action, before);
}
